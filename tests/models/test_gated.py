"""Lean gated MLPs: the same values and gradients, two tensors kept in place of three."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from fitune.models.kernels.gated import LeanJoinedMLP, LeanMLP, lean_mlps
from fitune.models.prepare import ready
from support import tiny

GATED = ("llama", "qwen2", "mistral", "qwen3", "gemma", "gemma2", "phi3", "glm", "glm4", "olmo2", "cohere", "granite")
OTHERS = ("gpt2", "bloom", "opt", "gpt_neox")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES))


def mlp_of(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("mlp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GATED)
def test_values_and_gradients_are_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    plain = mlp_of(model_of(kind)).to(dtype)
    lean = deepcopy(plain)
    assert lean_mlps(lean) == 1
    assert isinstance(lean, LeanMLP | LeanJoinedMLP)
    results = []
    for module in (plain, lean):
        x = torch.linspace(-4, 4, 5 * 64).view(5, 64).to(dtype).requires_grad_()
        out = module(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        results.append([out, x.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes that the backward pass waits for, beside weights and the input."""
    there = {p.untyped_storage().data_ptr() for p in (*module.parameters(), x)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("kind", ["llama", "glm"])
def test_one_tensor_of_three_is_not_kept(kind: str) -> None:
    """With weights that are not trained: down_proj's input is not needed then."""
    module = mlp_of(model_of(kind)).requires_grad_(False)
    x = torch.randn(10, 64, requires_grad=True)
    width = 4 * 10 * 96
    assert kept(module, x) == 3 * width
    lean_mlps(module)
    assert kept(module, x) == 2 * width


@pytest.mark.parametrize("kind", OTHERS)
def test_other_mlps_stay(kind: str) -> None:
    assert lean_mlps(tiny.make_model(kind) if kind in ("gpt2", "bloom") else model_of(kind)) == 0


def test_a_forward_of_another_s_stays() -> None:
    """It may look alike: what counts is what it does."""

    class Clipped(LlamaMLP):  # type: ignore[misc]  # transformers is Any to mypy
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))
            return out

    model = model_of("llama")
    mlp_of(model).__class__ = Clipped
    assert lean_mlps(model) == 0


def test_an_activation_without_a_derivative_of_its_own_stays() -> None:
    model = model_of("llama")
    mlp_of(model).act_fn = nn.ReLU()
    assert lean_mlps(model) == 0


def test_models_that_are_made_ready_have_them() -> None:
    for precision in ("fp32", "bf16"):
        assert isinstance(mlp_of(ready(tiny.make_model("llama"), precision)), LeanMLP)
