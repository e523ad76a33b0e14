"""Fused experts in few bits: what is packed, what it stands for, what goes through it, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import fitune
from fitune.checks import routercheck
from fitune.commands.train import train
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError
from fitune.core.options import QuantOptions
from fitune.core.records import Sample
from fitune.memory import plan
from fitune.memory.usage import usage
from fitune.models import adapters, families, methods, precision
from fitune.models import quant as quants
from fitune.models.configs import read_config, without_weights
from fitune.models.kernels.experts import Packed, Stack
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from fitune.models.quant import experts
from support import contract, every_type, measured, tiny
from support.measured import batch
from support.stops import Crash, StopAt, crash

IDS = torch.arange(5, 25)[None]
BITS = ("nf4", pytest.param("int8", marks=pytest.mark.full))
# one of each kind that transformers' interface knows: plain; transposed with biases and gates that alternate; without
# gates; with shared experts; with groups of experts and latent attention
KINDS = ("qwen3_moe", "gpt_oss", "nemotron_h", "qwen2_moe", "deepseek_v3", "mixtral", "olmoe", "glm4_moe")
# not behind that interface, so that their own code reads the parameters: all experts side by side, transposed; lists of
# rows; one at a time, some without weights; shared ones
OWN_CODE = ("llama4_text", "jetmoe", "longcat_flash", "inkling_text")
QUICK = ("qwen3_moe", "llama4_text")
SOME = [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.full)
    for kind in (*KINDS, *OWN_CODE)
    if kind in every_type.TYPES
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as wide as those that are published: what lies beside the packed numbers does not count."""
    config = Qwen3MoeConfig(
        vocab_size=400, hidden_size=256, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(str(folder))
    return folder


def stack_of(model: nn.Module, leaf: str) -> Stack:
    return next(stack for name, stack in experts.stacks(model) if name.endswith(leaf))


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def bytes_of(stack: Stack) -> int:
    return sum(t.numel() * t.element_size() for t in (stack.weight, *quants.constants(stack)))


@pytest.mark.parametrize(("name", "most"), [("nf4", 0.53), pytest.param("int8", 1 + 4 / 128, marks=pytest.mark.full)])
def test_bytes_of_a_weight(wide: Path, name: str, most: float) -> None:
    model = load_model(wide, quant=name, precision="bf16")
    for _, stack in experts.stacks(model):
        assert bytes_of(stack) / (stack.count * stack.outputs * stack.inputs) <= most
    kept = {part.part: part for part in precision.kept(model)}
    assert kept["fused experts"].bytes == sum(bytes_of(stack) for _, stack in experts.stacks(model))
    assert kept["fused experts"].weights == 8 * 3 * 128 * 256
    assert precision.weights_kept(model, torch.bfloat16).level == "ok"


@pytest.mark.full
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_expert_is_packed_as_a_linear_layer_is(wide: Path, kind: Any, double: bool) -> None:
    original: Any = Qwen3MoeForCausalLM.from_pretrained(str(wide), dtype=torch.bfloat16)
    model = load_model(wide, quant=QuantOptions(name="nf4", kind=kind, double=double))
    for leaf in ("gate_up_proj", "down_proj"):
        stack = stack_of(model, leaf)
        whole: Tensor = getattr(original.model.layers[0].mlp.experts, leaf)
        for number in range(stack.count):
            packed, state = bnb.functional.quantize_4bit(
                whole[number].detach().contiguous(), blocksize=64, compress_statistics=double, quant_type=kind
            )
            assert torch.equal(stack.weight[number], packed.flatten())
            exact = bnb.functional.dequantize_4bit(packed, state).float()
            assert (stack.matrix(number, torch.float32) - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.full
def test_int8_has_a_scale_for_each_row(wide: Path) -> None:
    original: Any = Qwen3MoeForCausalLM.from_pretrained(str(wide), dtype=torch.bfloat16)
    stack = stack_of(load_model(wide, quant="int8"), "down_proj")
    whole: Tensor = original.model.layers[0].mlp.experts.down_proj.detach().float()
    assert torch.allclose(stack.get_buffer("scales"), whole.abs().amax(dim=-1), rtol=1e-3)
    assert (stack.plain(torch.float32) - whole).abs().max() <= whole.abs().max() / 127


def gradient(model: Any) -> Tensor:
    x: Tensor = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model(inputs_embeds=x).logits.square().mean().backward()
    assert x.grad is not None
    return x.grad


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("kind", SOME)
def test_logits_and_gradients_are_those_of_the_plain_weights(kind: str, name: str, tmp_path: Path) -> None:
    folder = every_type.save(kind, tmp_path / kind)
    packed: Any = load_model(folder, quant=name)
    plain: Any = load_model(folder, quant=name, plain=True)
    assert any(isinstance(module, Packed) for module in packed.modules()) == (kind not in OWN_CODE[:3])
    assert list(experts.stacks(packed))
    assert precision.weights_kept(packed, torch.float32).level == "ok"
    assert not list(experts.stacks(plain))
    assert not any(isinstance(module, Packed) for module in plain.modules())
    assert off(packed(input_ids=IDS).logits, plain(input_ids=IDS).logits) <= 1e-6
    assert off(gradient(packed), gradient(plain)) <= 1e-6


@pytest.mark.parametrize("kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.full) for kind in OWN_CODE)])
def test_rows_of_another_expert_would_be_seen(kind: str, tmp_path: Path) -> None:
    """The comparison above is not blind."""
    folder = every_type.save(kind, tmp_path / "model")
    packed, plain = load_model(folder, quant="nf4"), load_model(folder, quant="nf4", plain=True)
    for _, stack in experts.stacks(packed):
        stack.weight.data.copy_(stack.weight.data.roll(1, 0))
    assert off(gradient(packed), gradient(plain)) > 1e-3


def test_a_row_without_an_expert_gets_nothing(wide: Path) -> None:
    """A router may send a row to no expert, by a number behind the last."""
    module = experts_of(load_model(wide, quant="nf4"))
    x, weights = torch.randn(3, 256), torch.ones(3, 1)
    out = module(x, torch.tensor([[1], [8], [2]]), weights)
    assert (out[1] == 0).all()
    assert torch.equal(out[[0, 2]], module(x[[0, 2]], torch.tensor([[1], [2]]), weights[:2]))


def test_only_reached_experts_are_made_plain(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of(load_model(wide, quant="nf4"))
    seen: list[int] = []
    real = type(module.down_proj).matrix
    monkeypatch.setattr(type(module.down_proj), "matrix", lambda s, n, dtype: (seen.append(n), real(s, n, dtype))[1])
    module(torch.randn(4, 256), torch.tensor([[1], [6], [1], [6]]), torch.ones(4, 1))
    assert seen == [1, 6, 1, 6]  # gate and up, then down


WAYS_TO_READ: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "linear": ((5, 64), lambda w, x: nn.functional.linear(x, w[1])),
    "linear with a bias": ((5, 64), lambda w, x: nn.functional.linear(x, w[-1], bias=torch.ones(8))),
    "no rows": ((0, 64), lambda w, x: nn.functional.linear(x, w[torch.tensor(2)])),
    "of more dimensions": ((2, 5, 64), lambda w, x: nn.functional.linear(x, w[0])),
    "at": ((5, 8), lambda w, x: x @ w[2]),
    "at, turned": ((5, 64), lambda w, x: x @ w[2].T),
    "side by side": ((3, 5, 8), lambda w, x: torch.bmm(x, w)),
    "side by side, turned": ((3, 5, 64), lambda w, x: torch.matmul(x, w.transpose(1, 2))),
    "several times turned": ((3, 5, 64), lambda w, x: x @ w.mT.mT.transpose(-1, -2)),
    "one for all": ((5, 8), lambda w, x: torch.matmul(x, w)),
    "einsum": ((5, 64), lambda w, x: torch.einsum("ti,eoi->teo", x, w)),
    "some of them": ((5, 64), lambda w, x: nn.functional.linear(x, w[0:2].reshape(-1, 64))),
    "the columns of one": ((5, 32), lambda w, x: nn.functional.linear(x, w[1][:, :32])),
    "its sizes": ((24, 64), lambda w, x: x.view(w.shape[0], w.size(1), -1) * w.ndim),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", WAYS_TO_READ)
def test_code_that_reads_a_stack_gets_what_the_parameter_gives(how: str, transposed: bool) -> None:
    size, read = WAYS_TO_READ[how]
    sides = (64, 8) if transposed else (8, 64)
    stack = (
        quants.find("nf4").stack((3, *sides), QuantOptions(name="nf4"), transposed=transposed).to_empty(device="cpu")
    )
    for number in range(3):
        stack.fill(number, torch.randn(sides))
    stack.adopt(torch.float32)
    plain = stack.plain(torch.float32)
    assert plain.shape == stack.shape == (3, 8, 64)
    results = []
    for weight in (stack, plain):
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        made = read(weight, x)
        made.square().sum().backward()
        assert x.grad is not None
        results.append((made, x.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.full
@pytest.mark.parametrize("name", BITS)
def test_what_is_planned_is_what_is_allocated(name: str, checkpointing: bool, wide: Path) -> None:
    """Packed experts to the byte, and one matrix made plain at a time, whichever experts are reached."""
    config = contract.config_for("lora", quant=name).model_copy(update={"checkpointing": checkpointing})
    base: Any = load_model(wide, quant=name)
    work = plan.Work(config, read_config(wide), [[batch(9, 5)], [batch(*[240] * 8)]])
    expected = usage(plan.traced(work), without="start").peak.bytes
    there = measured.really(base, config, work)
    assert abs(expected - there) <= 0.005 * there, (expected, there)


@pytest.mark.full
@pytest.mark.parametrize("kind", OWN_CODE[:3])
def test_code_that_reads_packed_experts_is_planned(kind: str, tmp_path: Path) -> None:
    """Its products keep no matrix for the backward pass either. Of LongCat's choices those without weights are counted
    as others are."""
    folder, config = every_type.save(kind, tmp_path / "model"), contract.config_for("lora", quant="nf4")
    work = plan.Work(config, read_config(folder), [[batch(9, 5)], [batch(*[240] * 8)]])
    expected = usage(plan.traced(work), without="start").peak.bytes
    there = measured.really(load_model(folder, quant="nf4"), config, work)
    assert -0.005 <= expected / there - 1 <= (0.06 if kind == "longcat_flash" else 0.005), (expected, there)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen3_moe", "jetmoe"])
def test_a_folder_in_few_bits_has_its_experts_in_full_by_name(kind: str, tmp_path: Path) -> None:
    folder = every_type.save(kind, tmp_path / "model")
    done = fitune.quantize(folder, tmp_path / "quantized", quant="nf4")
    fused = list(experts.parameters(without_weights(read_config(folder))))
    assert done.in_full.startswith(f"{len(fused)} parameters of fused experts, ")
    assert fused[0] in done.in_full
    written: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "quantized"))
    plain: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    assert torch.equal(written.get_parameter(fused[0]).float(), plain.get_parameter(fused[0]).float())
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in written.modules())


@pytest.mark.full
def test_a_model_without_experts_has_nothing_more_in_full(tmp_path: Path) -> None:
    done = fitune.quantize(tiny.save("llama", tmp_path / "model"), tmp_path / "quantized", quant="nf4")
    assert done.in_full == ""


class OwnExperts(nn.Module):
    """Code that does with its parameters what no stack can stand for, beside one that it reads as others do."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(4, 8, 64))
        self.given = nn.Parameter(torch.randn(4, 8, 64))
        self.unused = nn.Parameter(torch.randn(4, 8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read[0]) + routed(x, self.given)


def routed(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[1].T


def test_only_parameters_whose_use_is_understood_are_packed() -> None:
    assert list(experts.parameters(nn.Sequential(OwnExperts()))) == ["0.read"]


@pytest.mark.full
@pytest.mark.parametrize("skipped", ["experts", "down_proj"])
def test_skipped_experts_stay_and_are_named(skipped: str, wide: Path) -> None:
    model = load_model(wide, quant=QuantOptions(name="nf4", skip=[skipped]))
    assert not list(experts.stacks(model))
    found = precision.weights_kept(model, torch.bfloat16)
    assert (found.level, "quant.skip" in found.text) == ("warn", True)
    assert model(input_ids=IDS).logits.isfinite().all()


def test_a_skipped_name_that_is_nowhere_is_refused(wide: Path) -> None:
    with pytest.raises(ConfigError, match="matches no linear layer and no fused experts"):
        load_model(wide, quant=QuantOptions(name="nf4", skip=["gate"]))


@pytest.mark.full  # nf4 is in the sweep over every type
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_on_int8_resumes_to_the_same_bits_and_merges(checkpointing: bool, tmp_path: Path) -> None:
    folder = every_type.save("qwen3_moe", tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {
        "model": str(folder), "data": [str(data)], "quant": "int8", "max_steps": 4, "save_every": 2, "lr": 1e-2,
        "precision": "fp32", "sample_prompts": 1, "cache": "none", "checkpointing": checkpointing,
    }  # fmt: skip
    run = train(build({**settings, "output": str(tmp_path / "run")})).run
    broken = build({**settings, "output": str(tmp_path / "broken")})
    with pytest.raises(Crash):
        train(broken, watch=StopAt(2, crash))
    train(broken, resume=True)
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "broken"))
    assert one.read_bytes() == other.read_bytes()
    found = {one["rule"]: one["level"] for one in json.loads((Path(run) / "checks.json").read_text())}
    assert found["frozen-intact"] == "ok"
    assert fitune.merge(run, tmp_path / "merged").merge_error <= 1e-5
    merged: Any = load_model(tmp_path / "merged")
    assert not list(quants.packed(merged))
    assert off(merged(input_ids=IDS).logits, fitune.load(run).model(input_ids=IDS).logits) <= 1e-2


@pytest.mark.parametrize(("kind", "shared"), [("qwen3_moe", False), ("qwen2_moe", True), ("glm4_moe", True)])
def test_lora_is_on_attention_and_shared_experts(kind: str, shared: bool) -> None:
    model = adapters.attach(ready(every_type.model_of(kind)), contract.config_for("lora"))
    names = [name for name in trainable(model) if ".self_attn." not in name]
    assert all(".shared_expert" in name for name in names)
    assert bool(names) == shared
    assert not any("shared_expert_gate" in name for name in names)  # it chooses


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


# what auto means; such layers alone, of a block without experts too; all, some with another rank; fused experts as well
TARGETS: dict[str, dict[str, Any]] = {
    "auto": {},
    "alone": {"targets": ["up_proj"]},
    "all": {"targets": "all-linear", "ranks": {"up_proj": 3}},
    "fused too": {"experts": True},
}


@pytest.mark.parametrize("name", ["none", pytest.param("nf4", marks=pytest.mark.full)])
@pytest.mark.parametrize("which", ["auto", *(pytest.param(one, marks=pytest.mark.full) for one in list(TARGETS)[1:])])
def test_layers_that_peft_takes_for_fused_experts(which: str, name: str, tmp_path: Path) -> None:
    """By their last names, on some types. What is trained is the layer, what is saved is read here and by PEFT, and a
    second adapter goes beside it."""
    if (which, name) == ("fused too", "nf4"):
        pytest.skip("these must be plain")
    folder = every_type.save("deepseek_v3", tmp_path / "model")
    config = contract.config_for("lora", lora=TARGETS[which], quant=name)
    model: Any = load_model(folder, quant=name)
    expected = methods.find("lora").expected(model, families.of(model), config)
    model = adapters.attach(model, config)
    assert {name: p.numel() for name, p in trainable(model).items()} == expected
    assert any(".shared_experts.up_proj." in name for name in expected or ())
    for path, parameter in model.named_parameters():
        if ".lora_B." in path:
            nn.init.normal_(parameter, std=0.02)
    adapters.save(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        again = load_model(folder, quant=name, adapter=tmp_path / "adapter")
        assert off(again(input_ids=IDS).logits, tuned) <= 1e-6
        if name == "none":
            plain = AutoModelForCausalLM.from_pretrained(str(folder))
            assert off(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids=IDS).logits, tuned) <= 1e-5
        if which != "fused too":  # PEFT has no second adapter for parameters
            adapters.add(again, tmp_path / "adapter", "second")
            assert off(again(input_ids=IDS).logits, tuned) <= 1e-6
        with adapters.disabled(again):
            assert off(again(input_ids=IDS).logits, tuned) > 1e-3
    found = settings_of(tmp_path / "adapter")
    assert [one for one in found["target_parameters"] if one.endswith(".shared_experts.up_proj.weight")]
    assert not [one for one in found["target_modules"] if one.endswith("up_proj")]


def test_what_peft_has_not_for_parameters_is_refused() -> None:
    model: Any = ready(every_type.model_of("deepseek_v3"))
    config = contract.config_for("lora", lora={"dora": True})
    assert all(".self_attn." in name for name in trainable(adapters.attach(model, config)))
    asked = contract.config_for("lora", lora={"dora": True, "targets": ["q_b_proj", "up_proj"]})
    with pytest.raises(ConfigError, match="on deepseek_v3 PEFT takes up_proj for parameters"):
        adapters.attach(ready(every_type.model_of("deepseek_v3")), asked)


def test_how_routers_share_tokens(wide: Path) -> None:
    """All rows to two experts of eight: the others get none."""
    model: Any = load_model(wide, quant="nf4")
    gate = model.model.layers[0].mlp.gate
    gate.weight.data.zero_()
    gate.weight.data[:2] = model.model.embed_tokens.weight.data.mean(0)
    rows = [Sample(np.arange(5, 25, dtype=np.int32), np.ones(20, bool))] * 2
    (found,) = routercheck.router_load(model, rows, "flat")
    assert "1 routers over 40 tokens" in found.text
    assert "8 experts get none" in found.text
    assert not routercheck.router_load(ready(tiny.make_model("llama")), rows, "flat")


def with_experts(**changes: Any) -> RunConfig:
    return contract.config_for("lora", lora={"experts": True}, **changes)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_lora_on_fused_experts_has_pefts_names_and_sizes(kind: str) -> None:
    model: Any = ready(every_type.model_of(kind))
    expected = methods.find("lora").expected(model, families.of(model), with_experts())
    got = {name: p.numel() for name, p in trainable(adapters.attach(model, with_experts())).items()}
    assert got == expected
    assert sum(".experts." in name for name in got) == 2 * 2 * 2


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_fused_experts_is_planned_trained_and_merged(checkpointing: bool, tmp_path: Path) -> None:
    config = with_experts().model_copy(update={"checkpointing": checkpointing})
    work = plan.Work(config, every_type.config_of("qwen3_moe"), [[batch(9, 5)], [batch(*[240] * 25)]])
    expected = usage(plan.traced(work), without="start").peak.bytes
    there = measured.really(ready(every_type.model_of("qwen3_moe")), config, work)
    assert abs(expected - there) <= 0.005 * there, (expected, there)
    folder = every_type.save("qwen3_moe", tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {
        "model": str(folder), "data": [str(data)], "lora": {"experts": True}, "max_steps": 3, "lr": 1e-2,
        "precision": "fp32", "sample_prompts": 0, "cache": "none", "checkpointing": checkpointing,
    }  # fmt: skip
    run = train(build({**settings, "output": str(tmp_path / "run")}))
    assert run.last_loss < run.first_loss
    assert fitune.merge(run.run, tmp_path / "merged").merge_error <= 1e-5


def test_lora_on_experts_is_refused_where_it_cannot_be(wide: Path) -> None:
    shape = without_weights(read_config(wide))
    config = with_experts(quant="nf4")
    packed = methods.Quantized(quants.planned_experts(shape, config.quant), "nf4", "cpu")
    why = methods.find("lora").quant_problem(shape, families.of(shape), config, packed)
    assert why is not None
    assert "lora.experts needs plain experts" in why
    with pytest.raises(ConfigError, match="no fused experts that are plain"):
        adapters.attach(ready(tiny.make_model("llama")), with_experts())
    dropout = with_experts().lora.model_copy(update={"dropout": 0.1})
    with pytest.raises(ConfigError, match="goes with neither dora, dropout nor pissa"):
        methods.find("lora").check(with_experts().model_copy(update={"lora": dropout}))
