"""What can be said of a run before torch is imported, which takes long: paths that are not there, and names.

In: settings, or the paths that a verb was given. Out: nothing, or all that is wrong at once, with the nearest names
beside each path. What needs a model or data to be read comes later (prepare.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fitune.core import begun, catalog, locks
from fitune.core.begun import CONFIG, RUNS, SEAL
from fitune.core.config import RunConfig, build
from fitune.core.errors import Collector, ConfigError, DataError, ModelError, RunFolderError, nearest
from fitune.core.files import check_new, check_writable, expand, names_near, read_summed
from fitune.core.options import DataSource
from fitune.data import formats, readers, templates
from fitune.models import hub
from fitune.models.locate import not_a_model

MODEL, WEIGHTS = "config.json", "adapter_model.safetensors"
YAML = (".yaml", ".yml")


def checked(values: Mapping[str, Any], *, output: bool = True) -> RunConfig:
    """The settings of a new run, with nothing wrong that can be seen already.

    Args:
        values: settings by whatever names.
        output: will the run be written?

    Raises:
        FituneError, Problems: all that is wrong with the settings, and with the paths in them.
    """
    problems, found = Collector(), None
    with problems.gather():
        found = build(values)
    if found is not None:
        _each(problems, model, [found.model])
        for sources in (found.sources, found.eval_sources):
            _each(problems, data, sources())
        with problems.gather():
            template(found.template)
        if found.adapter is not None:
            _each(problems, adapter, [found.adapter])
        if output and found.output is not None:
            _each(problems, run_folder, [found.output])
    else:  # what can be said of the paths beside wrong settings
        _each(problems, model, _texts(values.get("model")))
        _each(problems, data, [DataSource(path=path) for path in _texts(values.get("data"))])
        _each(problems, run_folder, _texts(values.get("output")) if output else ())
    problems.raise_any()
    assert found is not None
    return found


def _texts(value: object) -> list[str]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return [str(one) for one in several if isinstance(one, (str, Path))]


def _each(problems: Collector, check: Callable[[Any], None], values: Iterable[Any]) -> None:
    for value in values:
        with problems.gather():
            check(value)


def together(*checks: Callable[[], object]) -> None:
    """Several checks, and all that they find at once.

    Raises:
        FituneError, Problems: what they found.
    """
    problems = Collector()
    for check in checks:
        with problems.gather():
            check()
    problems.raise_any()


def each(check: Callable[[Any], None], *values: Any) -> list[Callable[[], None]]:
    """One check of several values; what was not given (None) needs none."""
    return [partial(check, value) for value in values if value is not None]


# ---- models and runs ----


def model(name: str) -> None:
    """Raises ModelError where a name is that of no model: a folder, a hub id or an entry of the catalog."""
    folder = expand(name)
    if not folder.exists():
        _named(name)
    elif not (folder / MODEL).is_file():
        raise not_a_model(folder, name)


def model_or_config(name: str) -> None:
    """Raises ModelError where a model is not there of which a config.json is enough."""
    if not expand(name).is_file() and catalog.get(name) is None:
        model(name)


def folder(path: str | Path) -> None:
    """Raises ModelError where there is no such folder, and no hub has it."""
    if not expand(path).is_dir():
        model(str(path))


def _named(name: str) -> None:
    """What is no path must be in the catalog, or on a hub."""
    entry = catalog.get(name)
    if entry is not None or (hub.parse(name) is not None and not _is_local(name)):
        try:
            hub.check(entry.id if entry is not None else name)
        except ModelError as error:
            error.fix = f"{error.fix}; {not_there(name)}"
            raise
        return
    raise ModelError(
        f"{name}: no such folder",
        expected="a model folder, a hub id such as Qwen/Qwen2.5-0.5B, or a name of the catalog",
        fix=not_there(name),
    )


def _is_local(name: str) -> bool:
    """Is this the path of something that lies here, rather than a hub's org/name?"""
    path = expand(name)
    return (path.parent.is_dir() or path.parts[0] == RUNS.name) and catalog.by_id(name) is None


def not_there(name: str) -> str:
    """What is near to a model that is not there: folders beside it, and models of the catalog."""
    hints = [names_near(name, folders=True)]
    if hub.parse(name) is not None and not _is_local(name):  # an id: of those that are known the nearest
        hints = [f"of the catalog: {', '.join(nearest(name, [one.id for one in catalog.entries().values()]))}"]
    elif Path(name).name == name:
        hints.append(f"of the catalog: {', '.join(nearest(name, catalog.entries()))}")
        hints += [f"runs: {', '.join(nearest(str(RUNS / name), _runs()))}"] if _runs() else []
    return "; ".join(str(one) for one in hints)


def _runs() -> list[str]:
    return [str(one.parent) for one in RUNS.glob(f"*/{CONFIG}")]


def run(path: str | Path) -> None:
    """Raises RunFolderError where there is no run folder."""
    folder = expand(path)
    if not folder.exists():
        raise RunFolderError(f"{path}: not a run folder (there is no such folder)", fix=_run_near(path))
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"{path}: not a run folder (no {CONFIG})",
            fix="give the folder that --output named; a run that was killed before its settings were written has none: "
            "begin it again by the command that began it",
        )


def resumed(path: str | Path) -> None:
    """The same for a run that is to go on: nor may another process work in it."""
    run(path)
    locks.check(expand(path))


def _run_near(path: str | Path) -> str:
    return f"{names_near(path, folders=True)}" + (
        f"; runs: {', '.join(nearest(str(path), _runs()))}" if _runs() else ""
    )


def run_or_model(path: str | Path) -> None:
    """Raises ModelError where there is neither a run folder nor a model, InUseError where a run only begins."""
    folder = expand(path)
    if folder.is_dir() and (folder / CONFIG).is_file():
        return
    locks.check(folder)
    if folder.is_dir() and not (folder / MODEL).is_file():
        raise ModelError(f"{path}: neither a run nor a model", expected=f"a folder with {CONFIG} or {MODEL}")
    model(str(path))


def distinct(paths: Iterable[str | Path]) -> None:
    """Raises ConfigError where two paths are of one run, by other spellings, a link or a copy: it would count twice."""
    known: dict[str, str | Path] = {}
    for path in paths:
        mark = _mark(expand(path))
        if mark in known:
            raise ConfigError(
                f"{path}: the run {known[mark]} once more",
                received="one run twice, which would count as two",
                expected="each run once",
                fix=f"leave {path} out",
            )
        known[mark] = path


def _mark(folder: Path) -> str:
    """What a run is known by: its seal's identity, which a copy has too, else its path."""
    identity = (read_summed(folder / SEAL) or {}).get("identity")
    return str(identity["id"]) if isinstance(identity, dict) and "id" in identity else str(folder.resolve())


def adapter(path: str) -> None:
    """Raises ModelError where there is no adapter."""
    folder = expand(path)
    if not folder.exists():
        raise ModelError(f"{path}: no such adapter folder", fix=_run_near(path))
    if not any((place / WEIGHTS).is_file() for place in (folder, folder / "adapter")):
        begun_ = (
            "the run has not ended: wait for it, or go on with it by --resume" if (folder / CONFIG).is_file() else None
        )
        raise ModelError(f"{path}: no adapter here", expected=f"a run folder, or a folder with {WEIGHTS}", fix=begun_)


# ---- data, templates, outputs ----


def data(source: DataSource | str) -> None:
    """Raises DataError or ConfigError where a source has nothing to read, or its format is unknown."""
    source = DataSource(path=source) if isinstance(source, str) else source
    path = readers.locate(source.path)
    formats.check(source.format or "auto", source.map)
    if not readers.files(path):
        raise DataError("no data", file=path)


def template(name: str) -> None:
    """Raises ConfigError where there is no template of that name; those of a tokenizer are looked at later."""
    if name.endswith(YAML) and not expand(name).is_file():
        raise ConfigError(f"template {name}: no such file", expected="a YAML file", fix=names_near(name))
    if name not in ("auto", "chat_template"):
        templates.choose(name, None)


def new_folder(path: str | Path) -> None:
    """Raises RunFolderError where a folder is not new, or cannot be written."""
    target = expand(path)
    locks.check(target)
    check_new(target)
    check_writable(target)


def run_folder(path: str | Path) -> None:
    """The same for a run; one that was stopped may go on in its folder."""
    target = expand(path)
    locks.check(target)
    begun.check(target)
    check_writable(target)
