"""One of two processes that make a step in shards: `python shared_memory.py METHOD FOLDER`.

Prints what was planned for reading the model, for the step, and for a checkpoint, and the most bytes that torch's
profiler saw of each, as JSON. The files are in 16 bits, so that what is read is no page of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the profiler sees nothing of other threads

from fitune.core import imports

with imports.for_good():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitune.core.config import build
    from fitune.engine import optim, parallel
    from fitune.engine.shards import Shards, attend
    from fitune.engine.step_runner import StepRunner
    from fitune.memory import device
    from fitune.memory import plan as plans
    from fitune.memory.measure import allocated, most_allocated
    from fitune.memory.steps import made_up
    from fitune.models import adapters, by_blocks, methods
    from fitune.models.head import set_loss_rows
    from fitune.models.load import opened

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 1000, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
STEP = ("forward", "loss", "backward", "update")


def main(method: str, folder: Path) -> None:
    model_config = LlamaConfig(**SIZES)
    LlamaForCausalLM(model_config).bfloat16().save_pretrained(
        folder
    )  # before there is a group: its later processes save nothing
    more: dict[str, Any] = {"lora": {"targets": "all-linear"}} if method == "lora" else {}
    config = build({
        "model": str(folder), "data": ["d.jsonl"], "method": method, "precision": "fp32", "loss_rows": 64,
        "checkpointing": False, "parallel": "shard", **more,
    })  # fmt: skip
    small, large = made_up(1, 16, 900), made_up(2, 128, 900)
    work = plans.Work(config, model_config, [[small], [large]], processes=2)
    made = plans.plan(work, device.here("cpu"), name="m")
    planned = max(moment.bytes for moment in made.phases if moment.phase in STEP)
    world = parallel.join()
    world.connect(torch.device("cpu"))
    make = partial(optim.make, config=config, rates=partial(methods.find(method).rates, config))
    files = opened(folder, precision="fp32", device="cpu", quant=config.quant)
    made_: list[Any] = []

    def read() -> None:
        unread = by_blocks.opened(files, config, lambda part: None)
        assert unread is not None
        model = adapters.attach(unread.begun(), config)
        made_.extend([model, Shards(model, world, unread)])

    most_read = most_allocated(read, mapped=(folder / "model.safetensors").stat().st_size)
    model, shards = made_
    model.train()
    set_loss_rows(model, config)
    optimizer, _ = shards.begin(make, {})
    runner = StepRunner(model, "flat", 1.0, lambda _: None, lambda _: None, world=world, shards=shards)
    for _ in range(2):  # the optimizer's states, and FSDP's own
        runner.step([small], optimizer, 2 * small.weight)
    gc.collect()
    here = [one.to_local() if hasattr(one, "to_local") else one for one in model.parameters()]
    here += [value for states in optimizer.state.values() for value in states.values() if torch.is_tensor(value)]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in here}
    held = sum(sizes.values())
    most, left = allocated(lambda: runner.step([large], optimizer, 2 * large.weight), held)
    saved = most_allocated(lambda: [attend(tensors) for tensors in shards.contents(optimizer)[:2]], held)
    checkpoint = next(moment.bytes for moment in made.phases if moment.phase == "checkpoint")
    load = max(moment.bytes for moment in made.phases if moment.phase in ("load", "start"))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"load": load, "read": most_read, "whole": whole, "planned": planned, "measured": most}
    found |= {"unseen": left - held}  # buffers of gloo, one for each time that its thread was the last to let go
    found |= {"checkpoint": checkpoint, "saved": saved, "held": held}
    print(json.dumps({"rank": world.rank, **found}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
