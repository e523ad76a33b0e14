"""A checked request: what a plan, advice and a run are made for.

In: settings as a user gave them; for a plan, the device that it is for. Out: a Request, or every mistake that can be
found without the data and the weights, all of them at once: settings that contradict each other, a model, an adapter or
a file that is not there, a precision or a quantizer that does not go with the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fitune.core import catalog
from fitune.core.begun import free_folder
from fitune.core.blocks import AUTO
from fitune.core.config import RunConfig, build
from fitune.core.errors import Collector, ConfigError
from fitune.core.files import expand
from fitune.core.options import ROWS, DataSource
from fitune.data import formats, readers, templates, tokenizer
from fitune.engine import integrity, optim
from fitune.memory import device as devices
from fitune.models import adapters, families, methods, precision, quant, weights
from fitune.models.configs import (
    config_of,
    longest_row,
    quantized_as,
    read_config,
    read_config_file,
    without_weights,
)
from fitune.models.devices import pick_device
from fitune.models.locate import locate

NO_DATA = "-"  # stands for data that nobody named


@dataclass(frozen=True)
class Request:
    """What is asked for.

    config: checked, with absolute paths of the data, and a precision in place of auto. model_config: the model's
    transformers config. folder: of the model, where it is on this machine. name: of the model, for people. where: the
    device that it is to fit on. processes: that share each step; each is to fit.
    """

    config: RunConfig
    model_config: PretrainedConfig
    folder: Path | None
    name: str
    where: devices.Device
    processes: int = 1

    @property
    def method(self) -> methods.Method:
        """The method of tuning."""
        return methods.find(self.config.method)

    @property
    def longest_row(self) -> int:
        """The most tokens of a row: the model's positions less the method's virtual tokens."""
        return longest_row(self.model_config, self.method.virtual_tokens(self.config))

    @property
    def has_data(self) -> bool:
        """Did anybody name data?"""
        return self.config.data != [NO_DATA]

    def changed(self, **changes: Any) -> Request:
        """The same request with other settings, which are not checked again."""
        return replace(self, config=self.config.model_copy(update=changes))


def to_plan(model: str, *, data: Sequence[object], gpu: str | None, settings: Mapping[str, object]) -> Request:
    """The request for a plan: of a model that may not be here, for a device that may not be either.

    Args:
        model: a name of the catalog, a config.json, a model folder, or a hub id, of which config.json is fetched.
        data: files, folders, ids or their settings; none: every row is as long as max_length.
        gpu: a size (24GB), a GPU (rtx-4090), this-machine; None: this machine.
        settings: fields of the RunConfig.

    Raises:
        ConfigError, DataError, ModelError, Problems: what is wrong with it, all of it at once.
    """
    config = build({**settings, "model": model, "data": list(data) or [NO_DATA]})
    problems = Collector()
    changes = _check_settings(config, problems)
    where = found = None
    with problems.gather():
        where = _place(gpu, config.device)
    with problems.gather():
        if config.template not in ("auto", "chat_template"):  # those of the tokenizer, which may not be here
            templates.choose(config.template, None)
    with problems.gather():
        if config.adapter is not None:
            adapters.locate(config.adapter)
    with problems.gather():
        found = shape_for(model)
    problems.raise_any()
    assert where is not None
    assert found is not None
    return _check_model(Request(config.model_copy(update=changes), *found, where))


def to_train(config: RunConfig) -> Request:
    """The request for a run on this machine, with absolute paths, so that the run folder can be used from anywhere.

    Raises:
        ConfigError, DataError, ModelError, Problems: what is wrong with it, all of it at once.
    """
    problems = Collector()
    changes = _check_settings(config, problems)
    where = folder = None
    with problems.gather():
        where = devices.here(str(pick_device(config.device)))
    with problems.gather():
        folder = locate(config.model)
        changes["model"] = str(expand(folder.resolve()))
        read_config(folder)
        weights.check(folder)
        templates.choose(
            config.template,
            tokenizer.load(folder),
            system_role=config.system_role,
            options=config.template_options,
        )
    with problems.gather():
        if config.adapter is not None:
            place = adapters.locate(config.adapter).resolve()
            changes["adapter"] = str(place)
            integrity.check_adapter(place)
    problems.raise_any()
    assert where is not None
    assert folder is not None
    request = _check_model(Request(config, read_config(folder), folder, folder.name, where))
    output = config.output or free_folder(f"{folder.name}-{config.method}")
    return request.changed(**changes, output=output)


# ---- checks ----


def _check_settings(config: RunConfig, problems: Collector) -> dict[str, Any]:
    """Method, optimizer and data; gives the data by its absolute paths. What is wrong goes to the problems."""
    with problems.gather():
        methods.find(config.method).check(config)
        own_settings(config)
        own_objective(config)
    with problems.gather():
        optim.check(config)
    found: dict[str, Any] = {"data": [], "eval_data": []}
    for name, given in (("data", config.data), ("eval_data", config.eval_data)):
        for source in given:
            with problems.gather():
                found[name].append(source if source == NO_DATA else absolute(source))
    for source in [*config.sources(), *config.eval_sources()]:
        with problems.gather():
            formats.check(source.format or "auto", source.map)
    return found


def _check_model(request: Request) -> Request:
    """The request with a precision, which goes with the model and its device, as the quantizer does."""
    problems, config = Collector(), request.config
    with problems.gather():
        config = _precision(config, request.where, request.model_config)
    with problems.gather():
        quant_settings(config, request.model_config)
        check_quantized(replace(request, config=config))
    with problems.gather():
        check_offload(config, request.where)
    problems.raise_any()
    return replace(request, config=config)


def check_offload(config: RunConfig, where: devices.Device) -> None:
    """Activations wait in main memory beside a GPU alone, and in which blocks is said or left to the plan.

    Raises:
        ConfigError: --offload on a CPU, or beside --checkpointing auto.
    """
    if config.offload and where.kind != "cuda":
        raise ConfigError(
            "--offload: on a CPU activations are in main memory anyway", received=where.name, fix="leave --offload out"
        )
    if config.offload and config.checkpointing == AUTO:
        raise ConfigError(
            "--offload beside --checkpointing auto, which chooses both",
            fix="leave --offload out, or name the blocks of --checkpointing too",
        )


def _place(gpu: str | None, device: str) -> devices.Device:
    """Where the run is to fit; of this machine the device that the settings name."""
    where = devices.find(gpu)
    return devices.here(str(pick_device(device))) if where.here and device != "auto" else where


def shape_for(model: str) -> tuple[PretrainedConfig, Path | None, str]:
    """The config of a model by whatever names it, its folder where there is one, and a name for people.

    Raises:
        ModelError: nothing of that name, or a config that cannot be read.
    """
    entry = catalog.get(model)
    path = expand(model)
    if entry is not None and not path.exists():
        return config_of(entry.config), None, entry.name
    if path.is_file():
        return read_config_file(path), None, path.absolute().parent.name if path.name == "config.json" else path.name
    folder = locate(model, only=("config.json",))
    return read_config(folder), folder if path.is_dir() else None, folder.absolute().name if path.is_dir() else model


def _precision(config: RunConfig, where: devices.Device, model_config: object) -> RunConfig:
    """auto for a device that may not be here: bf16 where that is computed, else fp16 on a GPU."""
    if config.precision == "auto" and where.kind == "cuda":
        config = config.model_copy(update={"precision": "bf16" if where.bf16 else "fp16"})
    return precision.resolve(config, pick_device("cpu") if not where.here else pick_device(config.device), model_config)


def quant_settings(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Settings of a quantizer without one do nothing; neither do they on a model that is quantized already."""
    options = config.quant
    if options.name == "none" and options != quant.PLAIN:
        raise ConfigError("settings of quant are given, but nothing is quantized", fix="--quant nf4 or int8")
    there = quantized_as(model_config)
    if there.name != "none" and options.name not in ("none", there.name):
        raise ConfigError(
            f"--quant {options.name}: this model is quantized already, as {there.name}",
            fix="leave --quant out, or take the original model",
        )
    if options.name != "none":
        quant.find(options.name)


def own_settings(config: RunConfig) -> None:
    """Settings of another method than the run's would do nothing.

    Raises:
        ConfigError: some were given.
    """
    own = methods.find(config.method).options
    plain = type(config)(model=config.model, data=config.data)
    for group in sorted({method.options or "" for method in methods.TABLE.values()} | {"peft"}):
        if group and group != own and getattr(config, group) != getattr(plain, group):
            whose = next((m.name for m in methods.TABLE.values() if m.options == group), "peft:TYPE")
            raise ConfigError(
                f"settings of {group} are given, but the method is {config.method}",
                fix=f"leave them out, or --method {whose}",
            )


def own_objective(config: RunConfig) -> None:
    """Settings of another objective than the run's would do nothing.

    Raises:
        ConfigError: some were given.
    """
    plain = type(config)(model=config.model, data=config.data)
    for name in sorted(ROWS.keys() - {"sft", config.objective}):
        if getattr(config, name) != getattr(plain, name):
            raise ConfigError(
                f"settings of {name} are given, but the objective is {config.objective}",
                fix=f"leave them out, or --objective {name}",
            )


def absolute(source: str | DataSource) -> str | DataSource:
    """The source with its absolute path, of a data set on the hub that of its snapshot; its first row can be read."""
    path = readers.locate(source if isinstance(source, str) else source.path)
    next(readers.read_rows(path), None)
    # a link's own name is kept: it shows the kind of file, which that of its target may not
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return str(path) if isinstance(source, str) else source.model_copy(update={"path": str(path)})


def check_quantized(request: Request) -> None:
    """What cannot be tuned on quantized weights is refused before any are read.

    Raises:
        ConfigError: the method needs weights that it can change.
    """
    config, method = request.config, request.method
    options = quantized_as(request.model_config)
    options = options if options.name != "none" else config.quant
    if options.name == "none":
        return
    model = without_weights(request.model_config)
    packed = [*quant.planned(model, options), *quant.planned_experts(model, options)]
    quantized = methods.Quantized(packed, options.name, request.where.kind)
    reason = method.quant_problem(model, families.of(model), config, quantized)
    if reason is not None:
        raise ConfigError(
            f"{method.name} does not go with quant {options.name}: {reason}",
            fix="a method and settings that leave the base's weights alone (plain lora is one), or leave --quant out",
        )
