"""Whatever a file has become (scripts/broken_folders.py draws it with a seed), it is read right or refused by name with
exit code 2: nobody ever sees a traceback, or the last catch at the door."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fitune.cli import last_catch as lastcatch
from fitune.cli import main as cli
from fitune.core.errors import ModelError, RunFolderError
from fitune.data import tokenizer as tokenizers
from fitune.data.cache import Cache
from fitune.data.rows import load
from fitune.models.load import load_model
from support import tiny
from support.command import run as command

SCRIPT = Path(__file__).parents[2] / "scripts" / "broken_folders.py"
spec = importlib.util.spec_from_file_location("broken_folders", SCRIPT)
assert spec is not None
assert spec.loader is not None
broken = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = broken
spec.loader.exec_module(broken)

SETTINGS = ("--batch-size", 4, "--max-length", 64, "--max-steps", 2, "--save-every", 1, "--sample-prompts", 0)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """The command line, with a question for chat: exit code, standard error."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi?\n"))
    code, _, err = command(words, capsys, monkeypatch)
    return code, err


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a run on it, its adapter, and data."""
    root = tmp_path_factory.mktemp("damage")
    model = tiny.save("llama", root / "model")
    rows = tiny.write_rows(root / "rows.jsonl", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fitune", "train", "--model", str(model), "--data", str(rows)])
        sys.argv += [*map(str, SETTINGS), "--output", str(root / "run")]
        with suppress(SystemExit):
            cli.main()
    return {"root": root, "model": model, "run": root / "run", "adapter": root / "run" / "adapter", "rows": rows}


def commands(kind: str, copy: Path, folders: dict[str, Path], out: Path) -> list[tuple[object, ...]]:
    """What reads a folder of that kind."""
    rows, model = folders["rows"], folders["model"]
    if kind == "model":
        return [
            ("inspect", rows, "--model", copy),
            ("train", "--model", copy, "--data", rows, *SETTINGS, "--output", out),
            ("chat", copy),
            ("eval", copy, "--data", rows, "--loss-only", "--take", 4),
            ("export", copy, "--output", out),
            ("methods", "--model", copy),
        ]
    if kind == "adapter":
        return [("train", "--model", model, "--data", rows, "--adapter", copy, *SETTINGS, "--output", out)]
    return [
        ("train", "--resume", "--output", copy),
        ("chat", copy),
        ("eval", copy, "--data", rows, "--loss-only", "--take", 4),
        ("merge", copy, "--output", out),
    ]


def check(
    kind: str,
    seed: int,
    count: int,
    folders: dict[str, Path],
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = random.Random(seed)
    for number, damage in enumerate(broken.draw(folders[kind], seed=seed, count=count)):
        place = work / f"{kind}-{number}"
        copy = broken.copy_of(folders[kind], place / "copy")
        damage.do(copy)
        words = chosen.choice(commands(kind, copy, folders, place / "out"))
        code, err = run(capsys, monkeypatch, *words)
        case = f"seed {seed}, {damage}: fitune {words[0]}\n{err}"
        assert code in (0, 2), case
        assert "Traceback" not in err, case
        assert "failed unexpectedly" not in err, case
        if code == 2:
            assert Path(damage.file).name in err or str(copy) in err or str(folders["rows"]) in err, case


@pytest.mark.parametrize(("kind", "count"), [("model", 6), ("adapter", 3), ("run", 3)])
def test_damaged_files_are_refused_by_name(
    kind: str,
    count: int,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(kind, 4, count, folders, tmp_path, capsys, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["model", "adapter", "run"])
def test_many_damaged_files_are_refused_by_name(
    kind: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed = int(os.environ.get("FITUNE_SEED", "0")) or random.SystemRandom().randrange(10**6)
    check(kind, seed, 150, folders, tmp_path, capsys, monkeypatch)


def test_damages_are_drawn_alike_for_a_seed_and_cover_every_kind(folders: dict[str, Path]) -> None:
    files = ["config.yaml", "data.json", "steps.jsonl"]
    one, other, more = (broken.draw(folders["run"], seed=seed, count=70, files=files) for seed in (5, 5, 6))
    assert list(map(str, one)) == list(map(str, other)) != list(map(str, more))
    assert {damage.kind for damage in one} == set(broken.KINDS)


def test_the_last_catch_says_what_was_done_and_with_which_file(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fitune.commands import evaluate as evaluation

    def fails(*args: object, **how: object) -> None:
        path = tmp_path / "thing.json"
        raise KeyError(f"planted at {path.name}")

    monkeypatch.setattr(evaluation, "evaluate", fails)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache" / "data"))
    code, err = run(capsys, monkeypatch, "eval", folders["model"], "--data", folders["rows"])
    assert code == 1
    assert err.count("error: ") == 1
    assert "KeyError" in err
    assert "doing:    fitune eval" in err
    log = next((tmp_path / "cache" / "logs").glob("error-*.log"))
    assert str(log) in err
    assert "report it" in err
    assert "Traceback" not in err
    text = log.read_text()
    assert "Traceback" in text
    assert "planted at thing.json" in text
    assert "torch" in text
    monkeypatch.setenv(lastcatch.DEBUG, "1")
    code, err = run(capsys, monkeypatch, "eval", folders["run"], "--data", folders["rows"])
    assert (code, "Traceback" in err) == (1, True)
    assert list(folders["run"].glob("error-*.log"))  # a run's log lies in its folder


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []}
        | {"special_tokens": {}},
        {"type": "nope"},
    ],
)
def test_a_tokenizer_that_its_library_gives_up_at_is_one_message(
    model_folder: Path, tmp_path: Path, processor: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    copy = broken.copy_of(model_folder, tmp_path / "model")
    values = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**values, "post_processor": processor}))
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        tokenizers.load(copy)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "zz"},
        {"load_in_8bit": True, "llm_int8_threshold": "x"},
        {"load_in_8bit": True, "llm_int8_skip_modules": 3},
    ],
)
def test_a_quantization_that_the_weights_do_not_have_is_refused(
    model_folder: Path, tmp_path: Path, quantization: dict[str, Any]
) -> None:
    copy = broken.copy_of(model_folder, tmp_path / "model")
    values = json.loads((copy / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", **quantization}
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(copy)


def test_a_cache_that_is_deleted_while_it_is_used_is_one_message(tmp_path: Path, data_file: Path) -> None:
    rows = load([str(data_file)], cache=Cache(tmp_path / "cache")).rows
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RunFolderError, match="prepared data is gone"):
        list(rows)
