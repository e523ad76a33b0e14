"""What a GPU computes, held to float64 and to documents run alone.

The same bodies run on a CPU, which plays a GPU where code chooses, with a stand-in for the one kernel that it lacks: so
no line here runs for the first time on a GPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fitune.core.options import quant_options
from fitune.core.records import Batch, Sample
from fitune.data.batches import flat, split
from fitune.engine import optim
from fitune.engine.step import hidden_states, loss_sum, training_step
from fitune.models import adapters, determinism
from fitune.models import quant as quants
from fitune.models.devices import pick_device
from fitune.models.head import output_head
from fitune.models.kernels import target
from fitune.models.kernels.gated import lean_mlps
from fitune.models.kernels.loss import label_loss
from fitune.models.kernels.norm import LeanRMSNorm
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from fitune.models.switches import SDPA, attention, computing
from support import contract as contract
from support import memory_errors as recovering
from support import tiny
from support.flash import flash_by_hand
from support.gpu_scripts import load

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
everywhere = pytest.mark.parametrize("where", WHERE)
BOTH = [torch.float32, torch.bfloat16]
ON: list[Any] = [("cpu", one) for one in BOTH]  # float16 is slow on a CPU
ON += [pytest.param("cuda", one, marks=pytest.mark.cuda) for one in (*BOTH, torch.float16)]
in_each_dtype = pytest.mark.parametrize(("where", "dtype"), ON)
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of a result, as vectors
QUANTS = ["none", "int8", "nf4"]
STRICT = ["lora", "lora-dora", "full", "freeze", "prefix", "prompt", "p-tuning", "p-tuning-lstm", "houlsby", "ia3"]


@contextmanager
def gpu_code(where: str) -> Iterator[None]:
    """Inside, code chooses what it chooses on a GPU; on a CPU its kernel is written out."""
    if where == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, flash_by_hand(patch) as calls, target.planned(target.AMPERE):
        yield
        assert calls  # all documents went through one call


def apart(got: Tensor, right: Tensor) -> float:
    return float((got.detach().double().cpu() - right.detach().cpu()).norm() / right.detach().cpu().norm())


def with_gradients(work: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of a sum of its squares."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    out = work(*leaves)
    out.double().square().sum().backward()
    grads: list[Any] = [leaf.grad for leaf in leaves]
    return [out, *grads]


def check(got: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, right, strict=True):
        assert apart(a, b) <= ROUNDED[dtype]


# ---- kernels against float64 ----


@in_each_dtype
def test_losses_of_labels_equal_float64(where: str, dtype: torch.dtype) -> None:
    """Of several chunks, with weights and without, and the gradients of hidden states and head."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 32).to(dtype), (torch.randn(2_000, 32) / 6).to(dtype)
    labels, each = torch.randint(0, 2_000, (600,)), torch.rand(600)

    def chunks(a: Tensor, b: Tensor) -> Tensor:
        head = nn.Linear(32, 2_000, bias=False, device=where, dtype=dtype)
        head.weight = nn.Parameter(b.detach())
        total = label_loss(head, a, labels.to(where), 2_000, each.to(where), rows=256)
        (b.grad,) = torch.autograd.grad(total, head.weight, retain_graph=True)
        return total

    def whole(a: Tensor, b: Tensor) -> Tensor:
        total = (F.cross_entropy(a @ b.T, labels, reduction="none") * each.double()).sum()
        (b.grad,) = torch.autograd.grad(total, b, retain_graph=True)
        return total

    got: list[Tensor] = []
    right: list[Tensor] = []
    for found, work, kind, place in ((got, chunks, dtype, where), (right, whole, torch.float64, "cpu")):
        a, b = (one.to(place, kind).requires_grad_() for one in (hidden, weight))
        total = work(a, b)
        assert b.grad is not None
        kept = b.grad.clone()
        (grad,) = torch.autograd.grad(total, a)
        found += [total, grad, kept]
    check(got, right, dtype)


@in_each_dtype
def test_norms_and_mlps_equal_float64(where: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4)
    norm, mlp = LlamaRMSNorm(48, 1e-5), LlamaMLP(config)
    norm.weight.data.normal_(1, 0.2)
    x = torch.randn(37, 48).to(dtype)
    for module in (norm.to(dtype), mlp.to(dtype)):
        right = with_gradients(module.double(), x.double())
        module.to(where, dtype)
        lean = LeanRMSNorm(module.weight, 1e-5) if module is norm else module
        assert module is norm or lean_mlps(lean) == 1
        check(with_gradients(lean, x.to(where)), right, dtype)


@in_each_dtype
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_products_with_packed_weights_equal_float64(where: str, name: str, dtype: torch.dtype) -> None:
    """Against the values that the packed ones stand for, and those near the weight that was packed; on any device the
    same ones. The shape is none of those that a CPU's kernel gets wrong (quant/trust.py looks)."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256) / 16, torch.randn(19, 256).to(dtype)
    made, here = (
        quants.find(name).make(weight.clone(), quant_options(name), torch.device(place)) for place in (where, "cpu")
    )
    made.compute = dtype
    packed = made.plain_weight(torch.float32).double().cpu()
    right = with_gradients(lambda one: one @ packed.T, x.double())
    check(with_gradients(made, x.to(where)), right, dtype)
    assert apart(packed, weight.double()) < {"int8": 0.01, "nf4": 0.11}[name]
    assert apart(packed, here.plain_weight(torch.float32).double()) < 1e-3


# ---- documents of a flat batch against documents alone ----


def batch(*lengths: int) -> Batch:
    random = np.random.default_rng(0)
    made = [Sample(random.integers(5, 390, n).astype(np.int32), np.arange(n) > 0) for n in lengths]
    return flat(made, range(len(made)))


@torch.no_grad()
def logits(model: Any, made: Batch) -> Tensor:
    hidden = hidden_states(model, made, "flat")
    with computing(model):
        return output_head(model)(hidden).float().cpu()


@torch.no_grad()
def alone(model: Any, made: Batch) -> Tensor:
    """By transformers' own forward, a document at a time."""
    found = []
    for first, last in zip(made.bounds[:-1], made.bounds[1:], strict=True):
        ids = torch.from_numpy(made.ids[first:last])[None].long().to(model.device)
        with attention(model, SDPA), computing(model):
            found.append(model(input_ids=ids).logits[0].float().cpu())
    return torch.cat(found)


@everywhere
@pytest.mark.parametrize(
    ("kind", "quant"), [("llama", "none"), ("llama", "int8"), ("llama", "nf4"), ("mistral", "none"), ("gpt2", "none")]
)
def test_documents_in_one_call_are_documents_alone(where: str, kind: str, quant: str) -> None:
    """GQA, windows that documents are longer than, documents of one token; and what stands in one of them moves nothing
    in the others."""
    model = load_model(contract.folder_of(kind), precision="bf16", quant=quant, device=where)
    made = batch(1, 30, 1, 7, 24, 1)
    with gpu_code(where):
        found = logits(model, made)
        changed = batch(1, 30, 1, 7, 24, 1)
        changed.ids[1:31] = changed.ids[1:31][::-1].copy()
        moved = logits(model, changed)
    expected = alone(model, made)
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    assert torch.equal(found[31:], moved[31:])
    assert not torch.equal(found[1:31], moved[1:31])


@everywhere
@pytest.mark.parametrize("variant", STRICT)
def test_two_steps_have_the_same_bits_by_strict_algorithms(where: str, variant: str) -> None:
    """Nothing that a method does lacks a deterministic algorithm."""
    device, given = pick_device(where), batch(1, 12, 30, 5)
    config = contract.config_for(variant, "bf16")
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        base = ready(tiny.make_model("llama").to(device, torch.bfloat16), "bf16")
        if variant in ("full", "freeze"):
            base = base.float()
        model = adapters.attach(base, config).train()
        optimizer = optim.make(trainable(model), config)
        optim.set_learning_rate(optimizer, 1e-2)
        with determinism.exact(device):
            determinism.strict(True)
            done = [training_step(model, [given], optimizer, 1.0) for _ in range(2)]
        assert all(one.finite for one in done)
        ends.append([p.detach().cpu() for p in trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ---- loading, memory ----


@everywhere
@pytest.mark.parametrize("quant", QUANTS)
def test_a_model_is_loaded_onto_its_device(where: str, quant: str) -> None:
    """Every tensor lies there, and is what a CPU has; it answers there. A scale of NF4's blocks may be the next of its
    256 values: it is rounded behind a mean, which a GPU sums in another order."""
    folder = contract.folder_of("llama")
    there, here = (load_model(folder, precision="bf16", quant=quant, device=place) for place in (where, "cpu"))
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {where}
    packed = {f"{name}.weight" for name, _ in quants.layers(here)}
    assert bool(packed) == (quant != "none")
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        assert name in packed or torch.equal(a.cpu(), b)
    for (_, one), (_, other) in zip(quants.layers(there), quants.layers(here), strict=True):
        x, y = (layer.plain_weight(torch.float32).double().cpu().reshape(-1, 64) for layer in (one, other))
        scale = (x * y).sum(1) / (y * y).sum(1)
        assert apart(x, y) < 1e-3 if quant == "int8" else bool((scale - 1).abs().max() < 0.02)
        assert quant == "int8" or apart(x, scale[:, None] * y) < 1e-5
    ids = torch.arange(5, 12, device=where)[None]
    with attention(there, SDPA):
        made = there.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 10)


@contextmanager
def room_for(where: str, model: Any, tokens: int, most: Callable[[int], int]) -> Iterator[None]:
    """Inside, so many tokens fit, and twice as many do not: torch's allocator gets less of the card, or a layer fails.

    Args:
        where: the device.
        model: on it.
        tokens: of a part that fits.
        most: bytes that are reserved for a part of so many tokens.
    """
    if where == "cpu":
        recovering.fails_above(model, tokens, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        yield
        return
    enough, (_, total) = (most(tokens) + most(2 * tokens)) // 2, torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(enough / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def emptied() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@everywhere
def test_a_step_that_does_not_fit_there_is_done_in_halves(where: str) -> None:
    sizes = (512, 1536, 8, 512) if where == "cuda" else (32, 64, 3, 16)
    width, inner, blocks, length = sizes
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": 400}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).to(pick_device(where))
    config = contract.config_for("lora")
    model = adapters.attach(ready(base), config).train()
    optimizer = optim.make(trainable(model), config)
    given = batch(*[length] * 8)

    def most(tokens: int) -> int:
        emptied()
        loss_sum(model, split(given, 8 * length // tokens)[0]).backward()
        optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_reserved()

    with torch.no_grad():
        expected = sum(loss_sum(model, piece).item() for piece in split(given, 8)) / given.weight
    messages: list[str] = []
    with room_for(where, model, 4 * length, most):
        emptied()
        done, parts = recovering.careful(model, optimizer, [given], messages=messages)
    assert (parts, len(messages)) == (2, 1)
    assert done.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("where", [pytest.param("cpu", marks=pytest.mark.full), WHERE[1]])
def test_a_run_in_new_processes_goes_on_where_it_was_killed(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA with dropout, and nf4; the section of the acceptance."""
    checks = load("gpu_checks")
    checks.resume(checks.Here("resume", where == "cpu", tmp_path))
    texts = capsys.readouterr().out.splitlines()
    rows = [json.loads(text.removeprefix(checks.MARK)) for text in texts if text.startswith(checks.MARK)]
    assert len(rows) == 4
    assert all(row["passed"] for row in rows), rows


@everywhere
def test_every_trainable_parameter_gets_a_gradient_there(where: str) -> None:
    model = load_model(contract.folder_of("llama"), precision="bf16", quant="nf4", device=where)
    model = adapters.attach(model, contract.config_for("lora-all", "bf16")).train()
    loss_sum(model, batch(5, 9)).backward()
    assert all(p.device.type == where for p in model.parameters())
    assert sorted(n for n, p in model.named_parameters() if p.grad is None) == sorted(
        n for n, p in model.named_parameters() if not p.requires_grad
    )
