"""What was tuned, as files: saving it, putting it on a base, switching between several, and turning it off.

In: a model with a method on it. Out: a folder. Methods that PEFT knows are saved in PEFT's format. Ours (full, freeze,
tail, bitfit, adapter) are saved as the trainable tensors by name, with the settings that attach them again:

    adapter_config.json   adapter_model.safetensors     PEFT's
    encoder.safetensors                                 what P-tuning and a projected prefix train, to go on from
    fitune_adapter.json   adapter_model.safetensors     ours
    new_tokens.json       new_tokens.safetensors        rows of new tokens, beside any method
"""

from __future__ import annotations

from fitune.models.adapters.attach import attach, row_sizes, trained, trained_names
from fitune.models.adapters.files import NEW_IDS, NEW_ROWS, OWN_CONFIG, PEFT_CONFIG, WEIGHTS, locate, read_own
from fitune.models.adapters.load import load_into, put
from fitune.models.adapters.save import save, stored
from fitune.models.adapters.several import add, disabled, switch

__all__ = [
    "NEW_IDS",
    "NEW_ROWS",
    "OWN_CONFIG",
    "PEFT_CONFIG",
    "WEIGHTS",
    "add",
    "attach",
    "disabled",
    "load_into",
    "locate",
    "put",
    "read_own",
    "row_sizes",
    "save",
    "stored",
    "switch",
    "trained",
    "trained_names",
]
