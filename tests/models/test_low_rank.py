"""LoRA in few operations: PEFT's values and gradients, one copy of the input, and PEFT's own way wherever it is not
plain LoRA on a frozen layer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fitune.core.options import QuantOptions
from fitune.models import adapters
from fitune.models import quant as quants
from fitune.models.kernels import fused, low_rank
from fitune.models.kernels.low_rank import Copies, fuse
from support import contract, tiny

HALF = torch.bfloat16


class Layers(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(48, 32, bias=bias), nn.Linear(32, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def adapted(**settings: Any) -> tuple[Any, Copies]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["one", "two"], init_lora_weights=False, **settings)
    model: Any = get_peft_model(Layers().to(HALF), config)  # type: ignore[arg-type]  # any module will do
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return model, fuse(model)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers take it on a CPU too; which ones did."""
    seen: list[str] = []
    real = low_rank._Adapted.forward

    def forward(ctx: Any, *args: Any) -> Tensor:
        seen.append("layer")
        return real(ctx, *args)

    monkeypatch.setattr(fused, "wanted", lambda where: True)
    monkeypatch.setattr(low_rank._Adapted, "forward", staticmethod(forward))
    return seen


def run(model: nn.Module, x: Tensor, *, plain: bool = False) -> list[Tensor]:
    """What comes out, and the gradients of the input, A and B."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, HALF):
        out: Tensor = model(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [one for one in (out, x.grad, *grads) if one is not None]


def test_values_and_gradients_are_as_near_to_the_exact_ones_as_pefts(used: list[str]) -> None:
    model, _ = adapted()
    x = torch.randn(2, 7, 48).to(HALF)
    exact = deepcopy(model).double()
    right = run_exact(exact, x.double())
    found = run(model, x)
    assert used == ["layer", "layer"]
    for layer in (model.base_model.model.one, model.base_model.model.two):
        layer.__class__ = type(layer).__mro__[1]
    plain = run(model, x)
    assert used == ["layer", "layer"]
    for one, other, exactly in zip(found, plain, right, strict=True):
        errors = [float((e.double() - exactly).norm() / exactly.norm()) for e in (one, other)]
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert errors[0] <= 1.5 * errors[1] + 1e-4


def run_exact(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out: Tensor = model(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(HALF).double())
    return [out, *(t.grad for t in (x, *model.parameters()) if t.grad is not None)]


def test_with_and_without_one_copy_for_all_the_bits_are_the_same(used: list[str]) -> None:
    model, copies = adapted()
    x = torch.randn(5, 48).to(HALF)
    apart = run(model, x)
    with copies.whole():
        together = run(model, x)
    assert not copies._made
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_a_step_sees_the_weights_of_the_last_one(used: list[str]) -> None:
    model, copies = adapted()
    x = torch.randn(5, 48).to(HALF)
    with copies.whole():
        before = run(model, x)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(2)  # bumps no version that could be looked at
    with copies.whole():
        assert not torch.equal(before, run(model, x)[0])


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that the backward pass waits for, beside weights and the input."""
    there = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", HALF):
        out = model(x)
    assert out.requires_grad
    return sum(found.values())


def test_an_input_is_kept_once_in_the_dtype_that_is_computed_in(used: list[str]) -> None:
    model, copies = adapted()
    x = torch.randn(1000, 48).to(HALF).requires_grad_()
    with copies.whole():
        kept = saved(model, x)
    low = 1000 * 4 * 2 * 2  # x A of both layers
    between = 1000 * 32 * 2
    weights = sum(-(-p.numel() // 64) * 64 * 2 for p in model.parameters() if p.requires_grad)
    assert kept == low + between + weights


@pytest.mark.parametrize(
    "change",
    [
        lambda model: adapted(use_dora=True)[0],
        lambda model: adapted(lora_dropout=0.1)[0].train(),
        lambda model: adapted(lora_bias=True)[0],
        lambda model: (model.merge_adapter(), model)[1],
        lambda model: (model.add_adapter("b", LoraConfig(r=2, target_modules=["one", "two"])), both(model))[1],
        lambda model: (model.base_model.model.one.base_layer.weight.requires_grad_(),
                       model.base_model.model.two.base_layer.bias.requires_grad_(), model)[2],
    ],
    ids=["dora", "dropout", "bias", "merged", "two adapters", "trained base"],
)  # fmt: skip
def test_everything_else_goes_pefts_way(used: list[str], change: Any) -> None:
    model = change(adapted()[0])
    with torch.autocast("cpu", HALF):
        model(torch.randn(3, 48).to(HALF))
    assert used == []


def both(model: Any) -> Any:
    model.base_model.set_adapter(["default", "b"])
    return model


def test_on_a_cpu_pefts_own_way_is_taken() -> None:
    model, _ = adapted()
    x = torch.randn(5, 48).to(HALF)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank._Adapted, "forward", None)
        run(model, x)


def test_names_are_pefts() -> None:
    plain = tiny.make_model("llama")
    model = adapters.attach(plain, contract.config_for("lora-all"))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not any("fitune" in name for name in model.state_dict())
    assert "lora.Linear" in repr(model)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_packed_base_is_made_plain_once_each_way(
    used: list[str], monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    model, plain, made = packed(quant), [], []
    layer = model.base_model.model.one.get_base_layer()
    real = type(layer).plain_weight
    monkeypatch.setattr(type(layer), "plain_weight", lambda self, dtype: plain.append(dtype) or real(self, dtype))
    x = torch.randn(6, 64).to(HALF)
    found = run(model, x)
    assert used == ["layer", "layer"]
    assert len(plain) <= 4
    with monkeypatch.context() as patch:
        patch.setattr(fused, "wanted", lambda where: False)
        made = run(model, x)
    for one, other in zip(found, made, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 2e-2


def packed(quant: str, device: str = "cpu") -> Any:
    """The same layers, wider, on packed weights."""
    torch.manual_seed(0)
    model, options = Layers(bias=False), QuantOptions.model_validate({"name": quant})
    for name, inputs, outputs in (("one", 64, 128), ("two", 128, 64)):
        layer = quants.find(quant).make(torch.randn(outputs, inputs) / 8, options, torch.device(device))
        layer.compute = HALF
        setattr(model, name, layer)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["one", "two"], init_lora_weights=False)
    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do
    fuse(wrapped.to(device))
    return wrapped


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_on_a_gpu_it_is_as_near_to_the_exact_values_as_pefts(kind: str) -> None:
    model = adapted()[0].cuda() if kind == "plain" else packed(kind, "cuda")
    x = torch.randn(3, 40, 48 if kind == "plain" else 64).to(HALF)
    twice = [run(model, x.cuda()) for _ in range(2)]
    with fused.eager():
        plain = run(model, x.cuda())
    assert all(torch.equal(one, other) for one, other in zip(*twice, strict=True))
    exact = deepcopy(model).cpu().double() if kind == "plain" else None
    for number, (one, other) in enumerate(zip(twice[0], plain, strict=True)):
        assert one.dtype == other.dtype
        right = other.double().cpu() if exact is None else run_exact(exact, x.double())[number]
        errors = [float((e.double().cpu() - right).norm() / right.norm()) for e in (one, other)]
        assert errors[0] <= 1.5 * errors[1] + (1e-4 if exact is not None else 2e-2)
