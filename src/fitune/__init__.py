"""fitune fine-tunes open large language models on the hardware that you have.

    import fitune
    fitune.train(model="models/llama", data=["rows.jsonl"], method="lora", output="runs/first")
    fitune.generate("runs/first", "你好")

This module is only a door: what it offers is loaded when it is first used, so that `fitune --help` loads no torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitune import quant as quant
    from fitune import show as show
    from fitune.api import (
        Advised,
        Converted,
        Downloaded,
        Evaluation,
        Exported,
        Inspection,
        Merged,
        Plan,
        QuantizedModel,
        Result,
        StepRecord,
        Tracker,
        Tuned,
        Verdict,
        Watcher,
        advise,
        convert,
        download,
        evaluate,
        export,
        generate,
        inspect,
        load,
        load_model,
        merge,
        plan,
        quantize,
        serve,
        train,
        ui,
        verdict,
    )
    from fitune.core.errors import FituneError

from fitune.core.processor import set_defaults

set_defaults()
try:
    __version__ = metadata.version("fitune")
except metadata.PackageNotFoundError:  # the sources are on the path, as on a machine where nothing can be installed
    __version__ = "0+sources"
__all__ = [
    "Advised",
    "Converted",
    "Downloaded",
    "Evaluation",
    "Exported",
    "FituneError",
    "Inspection",
    "Merged",
    "Plan",
    "QuantizedModel",
    "Result",
    "StepRecord",
    "Tracker",
    "Tuned",
    "Verdict",
    "Watcher",
    "__version__",
    "advise",
    "convert",
    "download",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_model",
    "merge",
    "plan",
    "quant",
    "quantize",
    "serve",
    "show",
    "train",
    "ui",
    "verdict",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name == "FituneError":
        return import_module("fitune.core.errors").FituneError
    if name in ("quant", "show"):  # modules of their own; `import fitune` alone loads neither
        return import_module(f"fitune.{name}")
    if name in __all__:
        return getattr(import_module("fitune.api"), name)
    raise AttributeError(f"module 'fitune' has no attribute {name!r}")
