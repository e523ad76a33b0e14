"""Work and memory of a step beside their floors, for every method on every family of the contract.

    python benchmarks/floor.py results/floor.json --jobs 2         # all pairs, some minutes
    python benchmarks/floor.py - --only lora-llama full-gpt2       # some of them, on the screen

In: the contract's models (tests/support), eight times as wide, and 24 rows of text; the lengths are to the width as
those of alpaca_zh_demo are to that of a model of 0.5B. Out: for each pair executed FLOPs, counted by torch's
FlopCounterMode, beside the formulas of `memory/flops.py` twice: as they are where every block works on all rows
(`floor`), and where the last block works on label rows alone (`least`); and the bytes that the forward pass keeps for
the backward pass beside what it cannot do without (`Needed`). The sizes that batches and label rows are rounded up to
count as executed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from subprocess import run
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha import LoHaLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
for _place in (str(ROOT / "benchmarks" / "systems"), str(ROOT / "tests")):
    if _place not in sys.path:
        sys.path.append(_place)

from meter import Counters  # noqa: E402

from fitune.core.records import Batch, Sample  # noqa: E402
from fitune.data.batches import flat  # noqa: E402
from fitune.engine import step  # noqa: E402
from fitune.memory import flops  # noqa: E402
from fitune.models import adapters, attached, families, methods  # noqa: E402
from fitune.models.interfaces import causal_lm  # noqa: E402
from fitune.models.kernels.last_block import layers  # noqa: E402
from fitune.models.methods.adapter import Adapted, Bottleneck  # noqa: E402
from fitune.models.methods.base import is_linear  # noqa: E402
from fitune.models.methods.tail import ResidualMLP  # noqa: E402
from fitune.models.precision import DTYPES  # noqa: E402
from fitune.models.prepare import ready  # noqa: E402
from support import tiny  # noqa: E402
from support.contract import KINDS, REFUSED, VARIANTS, config_for  # noqa: E402

WIDER = 8
WIDTHS = (
    "hidden_size", "intermediate_size", "n_embd", "n_inner", "ffn_dim", "word_embed_proj_dim", "inner_hidden_size",
    "head_dim", "sliding_window",
)  # fmt: skip
MOST_EXECUTED, MOST_SAVED = 1.02, 1.05
BOUNDS = {"executed/floor": MOST_EXECUTED, "saved/floor": MOST_SAVED}
ROWS, SHORTEST, LONGEST, PROMPT = 24, 8, 72, 0.2


def wide(kind: str, precision: str = "fp32") -> Any:
    """A model of the contract, wider, ready to be tuned."""
    small = tiny.make_model(kind)
    config = small.config
    for name in WIDTHS:
        value = vars(config).get(name)
        if isinstance(value, int):
            setattr(config, name, WIDER * value)
    torch.manual_seed(0)
    return ready(type(small)(config).eval().to(DTYPES[precision]), precision)


def batch() -> Batch:
    """Rows of text, each with its answer behind a prompt."""
    random = np.random.default_rng(0)
    samples = []
    for length in random.integers(SHORTEST, LONGEST + 1, ROWS):
        mask = np.arange(length) >= max(1, int(length * PROMPT))
        samples.append(Sample(random.integers(5, 300, length).astype(np.int32), mask))
    return flat(samples, range(ROWS))


@dataclass(frozen=True)
class Measured:
    """Of one pair. by_rows: how its last block works on label rows. executed, floor, least: FLOPs; saved, needed: bytes
    (see the module's text)."""

    by_rows: str
    executed: float
    floor: float
    least: float
    saved: float
    needed: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ratios, and the absolute figures that they are of."""
        return {
            "last block": self.by_rows, "executed/floor": round(self.executed / self.floor, 4),
            "executed/least": round(self.executed / self.least, 4), "saved/floor": round(self.saved / self.needed, 4),
            "executed": self.executed, "saved": self.saved,
        }  # fmt: skip


def measure(variant: str, kind: str, precision: str = "fp32") -> Measured:
    """One pair: a step without its optimizer."""
    config = config_for(variant, precision)
    model: Any = adapters.attach(wide(kind, precision), config).train()
    step.last_block_is_ready(model)
    rows = batch()
    counters = Counters()
    counters.saved.held = {p.untyped_storage().data_ptr() for p in model.parameters()}  # these are held anyway
    with counters:
        loss = step.loss_sum(model, rows)
        saved = counters.saved.now
        loss.backward()
    executed = counters.flops.get_total_flops()
    model.zero_grad(set_to_none=True)
    counted = flops.counts(model, config)
    whole = replace(counted, body_by_rows=0.0, trained_by_rows=0.0, new_by_rows=0.0)
    lengths = np.diff(rows.bounds) + methods.find(config.method).virtual_tokens(config) * (config.method != "prefix")
    tokens = int(lengths.sum())
    floor, least = (flops.per_token(one, lengths, rows.targets / tokens) * tokens for one in (whole, counted))
    by_rows = attached.of(model).label_rows or "no"
    return Measured(by_rows, executed, floor, least, saved, Needed(model).bytes(rows))


class Needed:
    """The floor of what a forward pass keeps, from the shapes that the modules of a model meet in it.

    Each operation keeps what its own gradient needs, once and in the dtype of the computation; what another operation
    keeps already is not counted again:

        norm                   its input, and 4 bytes of a row and normed group (8 where it takes a mean away)
        attention              queries, keys, values and what comes out, and 4 bytes of a row and head. Its weights are
                               made again, whatever was done to them
        rotary positions       cosine and sine, once
        gated MLP              both halves of what goes into it
        other activation       what goes in; of ReLU, what comes out
        trained linear layer   its input; of the attention's last layer that is what comes out of attention
        frozen linear layer    nothing
        factors (IA3, VeRA), DoRA's magnitudes
                               what they are multiplied with
        LoHa of rank r         its input, what is between the products of rank r x r, and their factors
        bottleneck, MLP behind the final norm
                               beside its layers' inputs what goes into its activation
        dropout                a byte of an element; in attention none: what is dropped out is drawn again
        loss                   the gradient of the label rows; of a trained head its gradient in float32

    and only where a gradient passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.inner = model, causal_lm(model)
        self.family, self.item = families.of(self.inner), attached.compute_dtype(model).itemsize
        self.kept: dict[int, tuple[Tensor, int]] = {}  # by the address of a storage: held, so that none takes its place
        self.more = 0.0  # bytes
        self.seen: dict[nn.Module, float] = {}  # of a layer that gives keys and values: the most of them at a time

    def bytes(self, rows: Batch) -> float:
        """Of a forward pass of these rows."""
        with ExitStack() as stack:
            for hook in self._hooks():
                stack.callback(hook.remove)
            step.loss_sum(self.model, rows)
        head = self.inner.get_output_embeddings().weight
        found = self.more + rows.targets * self.inner.config.hidden_size * self.item
        found += 4.0 * head.numel() if head.requires_grad else 0.0
        return found + sum(size * self.item for _, size in self.kept.values())

    def _keep(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        first, size = self.kept.get(address, (tensor, 0))
        self.kept[address] = first, max(size, tensor.numel())

    def _hooks(self) -> Iterator[Any]:
        for module in self.model.modules():
            kind = type(module).__name__.lower()
            if "norm" in kind:
                yield module.register_forward_pre_hook(self._norm)
            elif is_linear(module):
                yield module.register_forward_pre_hook(self._linear)
            elif isinstance(module, nn.Dropout) and module.p:
                yield module.register_forward_hook(self._dropout)
            elif "rotary" in kind:
                yield module.register_forward_hook(self._angles)
            elif isinstance(module, ResidualMLP) or (isinstance(module, Bottleneck) and module.activation != "relu"):
                yield module.down.register_forward_hook(self._given)
            elif isinstance(module, (IA3Layer, VeraLayer, LoHaLayer, DoraLinearLayer)):
                yield module.register_forward_hook(self._peft)  # type: ignore[union-attr]  # a layer, too
        for block in self.family.block_list(self.inner):
            yield from self._of_block(block)

    def _of_block(self, block: nn.Module) -> Iterator[Any]:
        given = layers(block, self.family)
        assert given is not None
        for layer in given[1:] or given:
            yield layer.register_forward_hook(partial(self._keys, whole=len(given) == 1))
        attention = partial(self._attention, given[1:] or given)
        yield _part(block, self.family.out).register_forward_pre_hook(attention)
        if any("relu" in type(module).__name__.lower() for module in block.modules()):
            yield _part(block, self.family.mlp_out).register_forward_pre_hook(self._relu)
        else:
            for name in self.family.mlp_in:
                yield _part(block, name).register_forward_hook(self._given)

    def _norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if torch.is_grad_enabled() and (x.requires_grad or _trains(module)):
            self._keep(x)
            width = max((p.numel() for p in module.parameters(recurse=False)), default=x.shape[-1])
            self.more += x.numel() / width * (8 if isinstance(module, nn.LayerNorm) else 4)

    def _linear(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and cast(Tensor, module.weight).requires_grad:
            self._keep(args[0])

    def _dropout(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad and module.training:
            self.more += out.numel()

    def _angles(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        for one in _tensors(out):
            self._keep(one)

    def _given(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            self._keep(out)

    def _relu(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            self._keep(args[0])

    def _peft(self, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, IA3Layer) and module.is_feedforward:
            self._keep(args[0])
        elif isinstance(module, LoHaLayer):
            self._keep(args[0])
            rank = next(iter(module.r.values())) ** 2
            rows = out.numel() // out.shape[-1]
            self.more += rank * (rows + module.in_features + module.out_features) * self.item
        elif isinstance(module, VeraLayer):
            rank = next(iter(module.r.values()))
            self.more += (out.numel() + out.numel() // out.shape[-1] * rank) * self.item
        else:  # DoRA, or factors on what a layer gives
            self.more += out.numel() * self.item

    def _keys(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor, *, whole: bool) -> None:
        if out.untyped_storage().nbytes() < out.numel():
            return  # it stands for nothing
        config = self.inner.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads * head if whole else 0
        self.seen[module] = max(self.seen.get(module, 0), out.numel() * (1 - queries / out.shape[-1]))

    def _attention(self, given: Sequence[nn.Module], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        out = args[0]
        if out.requires_grad:
            self._keep(out)
            self.more += 4 * self.inner.config.num_attention_heads * out.shape[-2]
            self.more += (out.numel() + sum(self.seen[layer] for layer in given)) * self.item


def _part(block: nn.Module, name: str) -> nn.Module:
    """A part of a block, also where an adapter stands around what holds it."""
    found = block
    for leaf in name.split("."):
        if isinstance(found, Adapted) and not hasattr(found, leaf):
            found = found.base
        found = found.get_submodule(leaf)
    return found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def pairs() -> list[tuple[str, str]]:
    """Every pair that the contract does not refuse."""
    return [(variant, kind) for kind in KINDS for variant in VARIANTS if (variant, kind) not in REFUSED]


def over(found: dict[str, Any]) -> list[str]:
    """What is above its bound."""
    return [f"{name} {found[name]}" for name, bound in BOUNDS.items() if found[name] > bound]


def _measured(pair: tuple[str, str], precision: str) -> dict[str, Any]:
    return measure(*pair, precision).as_dict()


def main() -> None:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, help="a JSON file, or - for the screen alone")
    options.add_argument("--only", nargs="*", help="pairs such as lora-llama")
    options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options.add_argument("--jobs", type=int, default=1, help="processes side by side; what they count is the same")
    given = options.parse_args()
    chosen = [pair for pair in pairs() if not given.only or "-".join(pair) in given.only]
    table: dict[str, Any] = {}
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        measured = pool.map(partial(_measured, precision=given.precision), chosen)
        for (variant, kind), found in zip(chosen, measured, strict=True):
            table[f"{variant} on {kind}"] = found
            ratios = "  ".join(f"{name} {value:.3f}" for name, value in found.items() if "/" in name)
            print(f"{variant:17} {kind:11} {ratios}  {', '.join(over(found))}", flush=True)
    within = [sum(found[name] <= bound for found in table.values()) for name, bound in BOUNDS.items()]
    both = sum(not over(found) for found in table.values())
    print(f"of {len(table)} within the bound of work {within[0]}, of bytes saved {within[1]}, of both {both}")
    if str(given.out) != "-":
        commit = run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        written = {
            "command": "python benchmarks/floor.py results/floor.json --jobs 2",
            "date": datetime.now(UTC).date().isoformat(), "commit": commit, "precision": given.precision,
            "bounds": {"executed": MOST_EXECUTED, "saved": MOST_SAVED},
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")}, "pairs": table,
        }  # fmt: skip
        given.out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
