"""Quantized weights: the references, bitsandbytes against them, and the traps that fitune closes."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, has_avx512bf16
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from fitune.checks import guards, leak
from fitune.commands.merge import merge
from fitune.commands.quantize import quantize
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError, Problems, RunFolderError
from fitune.core.options import QuantOptions, quant_options
from fitune.data.batches import flat
from fitune.engine.step import loss_sum
from fitune.memory.trace import Tracer
from fitune.models import adapters, precision
from fitune.models import quant as quants
from fitune.models.kernels import target
from fitune.models.kernels.frozen import Frozen
from fitune.models.load import load_model
from fitune.models.prepare import ready
from fitune.models.quant import absmax, direct, nf4, trust
from fitune.models.quant.int8 import Int8Linear
from fitune.models.weights import stored_dtype
from support import every_type, tiny
from support.contract import IDS, config_for, gradients, logits, samples
from support.peak import _peak

WEIGHT = torch.randn(48, 80, generator=torch.Generator().manual_seed(1)) / 8


def inputs(rows: int = 12, width: int = 80, outliers: int = 0) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(2))
    x[:, :outliers] *= 30
    return x


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def llm_int8(x: torch.Tensor, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8() by hand: inputs quantized by row, columns over the threshold taken out and added as they are."""
    columns = absmax.outlier_columns(x, threshold)
    rest = x.clone()
    rest[:, columns] = 0
    (q_x, scale_x), (q_w, scale_w) = absmax.quantize(rest, by_row=True), absmax.quantize(weight, by_row=True)
    product = (q_x.double() @ q_w.double().T).to(x.dtype) * scale_x * scale_w.T
    return product + x[:, columns] @ absmax.dequantize(q_w[:, columns], scale_w).to(x.dtype).T


def bitsandbytes_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product that bitsandbytes takes on a GPU, here by its kernels for a CPU."""
    state = bnb.MatmulLtState()
    state.CB, state.SCB = layer.weight.data, layer.scales()
    state.has_fp16_weights, state.threshold, state.is_training = False, 6.0, False
    out: torch.Tensor = bnb.matmul(x.half(), None, state=state)
    return out.to(x.dtype)


# ---- the references ----


def test_absmax_by_hand() -> None:
    x = torch.tensor([0.1, -0.3, 0.25, 0.15, -0.05])
    q, scale = absmax.quantize(x)
    assert q.tolist() == [42, -127, 106, 64, -21]
    assert float(scale) == pytest.approx(0.3 / 127)
    assert (absmax.dequantize(q, scale) - x).abs().max() <= scale / 2
    q, scale = absmax.quantize(torch.zeros(2, 3), by_row=True)
    assert not q.any()
    assert not absmax.dequantize(q, scale).any()


def test_outliers_are_what_ruins_int8_and_taking_them_out_mends_it() -> None:
    x = inputs(outliers=2)
    exact = x @ WEIGHT.T
    assert absmax.outlier_columns(x, 6.0).tolist() == [0, 1]
    assert absmax.outlier_columns(x, 0.0).tolist() == []
    plain, decomposed = off(llm_int8(x, WEIGHT, 0.0), exact), off(llm_int8(x, WEIGHT, 6.0), exact)
    assert decomposed < 0.012
    assert plain > 2 * decomposed


def test_int8_of_bitsandbytes_is_the_reference() -> None:
    layer: Any = quants.find("int8").make(WEIGHT, QuantOptions(name="int8"), torch.device("cpu"))
    q, scale = absmax.quantize(WEIGHT.half().float(), by_row=True)  # it looks at weights in float16
    assert (layer.weight.data.int() - q.int()).abs().max() <= 1  # where the quotient is a half, one or the other
    assert (layer.weight.data != q).float().mean() < 0.01
    assert torch.allclose(layer.scales(), scale[:, 0] * 127)
    x = inputs(outliers=2)
    weight = layer.plain_weight(torch.float32)
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)
    assert off(layer(x), x @ WEIGHT.T) < 0.01  # 8-bit weights, plain inputs
    # what is tested below by their product is LLM.int8() with its outlier columns
    assert off(bitsandbytes_product(layer, x), llm_int8(x, WEIGHT, 6.0)) < 4e-3  # they round to float16


# bitsandbytes compiles its kernel on a CPU, for each shape anew; the quick run has it uncompiled
@pytest.mark.parametrize(
    ("shape", "stance"),
    [((5, 13), "force_eager"),
     *(pytest.param(one, "default", marks=pytest.mark.full) for one in ((5, 13), (48, 80), (3, 64)))],
)  # fmt: skip
def test_nf4_of_bitsandbytes_is_the_reference(shape: tuple[int, int], stance: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = get_4bit_type("nf4", "cpu")
    assert (nf4.quantiles() - values).abs().max() <= 1.2e-7  # they keep the same quantiles, rounded otherwise
    layer: Any = quants.find("nf4").make(weight, QuantOptions(name="nf4", double=False), torch.device("cpu"))
    state, (numbers, scales) = layer.weight.quant_state, nf4.reference(weight, values)
    assert torch.equal(scales, state.absmax)
    assert torch.equal(nf4.plain(numbers, scales, values, weight.shape), layer.plain_weight(torch.float32))
    with torch.compiler.set_stance(stance):
        if not trust.check([layer], torch.float32):  # their own kernel too, where this machine's is right
            assert torch.equal(dequantize_4bit(layer.weight.data, state), layer.plain_weight(torch.float32))
    # doubly: exact, given the constants that bitsandbytes stores
    layer = quants.find("nf4").make(weight, QuantOptions(name="nf4"), torch.device("cpu"))
    state = layer.weight.quant_state
    doubled = nf4.single_scales(state.absmax, state.state2.code, state.state2.absmax, state.offset)
    assert torch.equal(nf4.plain(numbers, doubled, values, weight.shape), layer.plain_weight(torch.float32))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (QuantOptions(name="nf4"), 0.1), (QuantOptions(name="nf4", double=False), 0.1),
        (QuantOptions(name="nf4", kind="fp4"), 0.16), (QuantOptions(name="nf4", storage="bf16"), 0.1),
        (QuantOptions(name="int8"), 0.01),
    ],
)  # fmt: skip
def test_bytes_and_errors_of_every_kind(options: QuantOptions, error: float) -> None:
    quantizer = quants.find(options.name)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(4))
    layer = quantizer.make(weight, options, torch.device("cpu"))
    assert off(layer.plain_weight(torch.float32), weight) < error
    there = layer.weight.numel() * layer.weight.element_size()
    there += sum(t.numel() * t.element_size() for t in quants.constants(layer))
    per_row = 4 * 256 if options.name == "int8" else 0
    assert there == pytest.approx(quantizer.bytes_per_weight(options) * weight.numel() + per_row, rel=1e-3)
    assert quants.numel(layer.weight) == weight.numel()


# ---- one path ----


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_train_and_eval_are_one_function(name: str) -> None:
    layer: Any = quants.find(name).make(WEIGHT, quant_options(name), torch.device("cpu"))
    x = inputs(outliers=2)
    training = layer.train()(x.clone().requires_grad_())
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), training)


def test_bitsandbytes_alone_evaluates_another_function_than_it_trains() -> None:
    """What the test above guards against is really there."""
    layer: Any = quants.find("int8").make(WEIGHT, quant_options("int8"), torch.device("cpu"))
    layer.__class__ = bnb.nn.Linear8bitLt
    x = inputs(outliers=2)
    training = layer.train()(x)
    assert off(layer.eval()(x), training) > 1e-3


def test_no_document_moves_another_through_int8_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM.int8() looks for outlier columns over the whole batch; the product here, one on every device, does not."""
    model = load_model(folder, quant="int8")
    with torch.no_grad():  # inputs as large as those of models of billions of parameters
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(3)
    assert leak._leak(model, samples(), "flat").moved <= 1e-6
    assert leak.packing_leak(model, samples())[0] == "flat"
    monkeypatch.setattr(Int8Linear, "product", bitsandbytes_product)
    assert leak._leak(model, samples(), "flat").moved > leak.MOVED
    assert leak.packing_leak(model, samples())[0] == "documents"  # one forward for each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_weights_are_made_plain_in_the_same_bits_on_cpu_and_gpu(dtype: torch.dtype) -> None:
    """A GPU casts as it multiplies: one kernel and one new tensor. The right value: number times rounded scale."""
    layer: Any = quants.find("int8").make(WEIGHT, QuantOptions(name="int8"), torch.device("cpu"))
    here = layer.plain_weight(dtype)
    with target.planned(target.AMPERE):
        assert torch.equal(layer.plain_weight(dtype), here)
    exact = absmax.dequantize(layer.weight.data, layer.scales()[:, None] / 127)
    assert here.dtype == dtype
    assert (here.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    for where in (target.CPU, target.AMPERE):
        tracer = Tracer(where)
        with tracer, target.planned(where):
            made = layer.plain_weight(dtype)
        sizes = sorted(size for _, size in tracer.events if size > 1000)
        assert sizes == [made.numel() * made.element_size()], where


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_gradients_are_those_of_the_plain_weight(name: str) -> None:
    layer: Any = quants.find(name).make(WEIGHT, quant_options(name), torch.device("cpu"))
    layer.bias = nn.Parameter(torch.ones(48))
    plain = quants.plain_layer(layer).requires_grad_(True)
    assert type(plain) is nn.Linear
    grads: list[Any] = []
    for module in (layer, plain):
        x = inputs().requires_grad_()
        module(x).square().sum().backward()
        grads.append((x.grad, module.bias.grad))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-4)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)


def test_a_trained_bias_keeps_its_dtype_in_a_16_bit_forward() -> None:
    for name in ("int8", "nf4"):
        layer: Any = quants.find(name).make(WEIGHT, quant_options(name), torch.device("cpu"))
        layer.bias, layer.compute = nn.Parameter(torch.full((48,), 1 / 3)), torch.bfloat16
        assert layer(inputs().bfloat16()).dtype == torch.bfloat16
        assert layer.bias.dtype == torch.float32
        assert float(layer.bias[0]) == pytest.approx(1 / 3, rel=1e-6)
        layer.compute_dtype = torch.bfloat16
        layer.__class__ = quants.find(name).base  # bitsandbytes' own forward rounds it, for good
        layer(inputs().bfloat16())
        assert layer.bias.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("base") / "llama")


def test_evaluation_in_the_middle_changes_no_later_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag stands for a CPU with AVX512-BF16, where bitsandbytes' layer packs itself anew in eval()."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = adapters.attach(load_model(folder, precision="bf16", quant="nf4"), config_for("lora", "bf16"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = gradients(model)
    first = logits(model)  # evaluates
    assert all(not layer.support_avx512bf16_for_cpu for _, layer in quants.layers(model))
    assert torch.equal(logits(model), first)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_the_repacking_that_is_closed_really_happens_in_bitsandbytes() -> None:
    layer: Any = quants.find("nf4").make(torch.randn(64, 64), QuantOptions(name="nf4"), torch.device("cpu"))
    before = layer.weight.data.clone()
    layer.__class__ = bnb.nn.Linear4bit
    layer.support_avx512bf16_for_cpu, layer.compute_dtype = True, torch.bfloat16
    layer.eval()
    try:
        with torch.no_grad():
            layer(inputs(width=64).bfloat16())
    except RuntimeError:
        pass  # the kernel is not there on every CPU; the weight is packed before it is called
    assert layer.weight.data.shape != before.shape or not torch.equal(layer.weight.data, before)


# ---- models ----


def test_loading_holds_at_most_two_large_layers_beside_the_quantized_model(tmp_path: Path) -> None:
    """Allocated bytes, by the allocator's own count, while a model of 20 blocks is read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=20, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(str(tmp_path))
    whole = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * 4
    largest = 256 * 1024 * 4
    for name in ("nf4", "int8"):
        peak, model = _peak(lambda name=name: load_model(tmp_path, quant=name), tmp_path)
        packed = sum(part.bytes for part in precision.kept(model))
        assert packed < whole / 3
        assert peak <= packed + 2 * largest + 2**20, (name, peak, packed)
    peak, _ = _peak(lambda: quants.dequantize(load_model(tmp_path, quant="nf4")), tmp_path)
    assert peak > whole / 2  # the count does see a model that is there in full


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_skipped_layers_and_the_head_stay_as_they_are(folder: Path, name: str) -> None:
    model = load_model(folder, quant=quant_options(name).model_copy(update={"skip": ["down_proj", "layers.1"]}))
    there = {n for n, _ in quants.layers(model)}
    assert not any("down_proj" in n or "layers.1." in n for n in there)
    assert len(there) == 2 * 6
    assert type(model.lm_head) is nn.Linear
    parts = {(part.part, part.note): part for part in precision.kept(model)}
    assert parts["output head", "not quantized: never is"].weights == 400 * 32
    assert parts["linear layers", "not quantized: quant.skip"].weights == 3 * 32 * 64 + (
        2 * 32 * 48 + 2 * 32 * 24 + 2 * 32 * 64
    )
    with pytest.raises(ConfigError, match=r"quant.skip: 'down_porj' matches no linear layer[\s\S]*did you mean"):
        load_model(folder, quant=quant_options(name).model_copy(update={"skip": ["down_porj"]}))


def test_every_byte_is_reported_and_every_cast(folder: Path) -> None:
    model = load_model(folder, precision="bf16", quant="nf4")
    model = adapters.attach(model, config_for("lora", "bf16"))
    parts = precision.kept(model, stored_dtype(folder))
    there = sum(p.numel() * p.element_size() for p in model.parameters())
    there += sum(t.numel() * t.element_size() for _, layer in quants.layers(model) for t in quants.constants(layer))
    assert sum(part.bytes for part in parts) == there
    by_part = {part.part: part for part in parts}
    assert by_part["embeddings"].dtype == "bfloat16"
    assert by_part["embeddings"].note == "cast from float32"
    assert by_part["output head"].dtype == "bfloat16"  # not float32, as prepare_model_for_kbit_training makes it
    assert by_part["trained"].dtype == "float32"
    assert by_part["linear layers"].dtype == "nf4"


def test_experts_that_stay_in_16_bits_are_reported(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(str(tmp_path))
    model = load_model(tmp_path, quant=QuantOptions(name="nf4", skip=["experts"]))
    found = precision.weights_kept(model, torch.float32)
    assert found.level == "warn"
    experts = next(part for part in precision.kept(model) if part.part == "fused experts")
    assert experts.bytes == 2 * 4 * 3 * 32 * 64 * 4
    assert precision.size(experts.bytes) in found.text


def test_weights_do_not_depend_on_the_precision_of_the_run(folder: Path) -> None:
    """A merge computes in float32; what it makes plain must be what a bf16 run was tuned on."""
    for name in ("int8", "nf4"):
        low, high = (dict(quants.layers(load_model(folder, precision=p, quant=name))) for p in ("bf16", "fp32"))
        assert low.keys() == high.keys()
        for key, layer in low.items():
            assert torch.equal(layer.plain_weight(torch.float32), high[key].plain_weight(torch.float32))


# ---- runs ----


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_run_is_saved_talked_to_merged_and_resumed(name: str, folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", 40)
    settings = {
        "model": str(folder), "data": [str(data)], "quant": name, "precision": "fp32", "max_steps": 8, "batch_size": 4,
        "lr": 1e-2, "save_every": 4, "eval_every": 4, "sample_prompts": 1,
        "sample_tokens": 4,
    }  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    done = train(build({**settings, "output": str(first)}))
    plain = sum(p.numel() for p in tiny.make_model("llama").parameters())
    assert done.total_parameters == plain + done.trainable_parameters  # packed weights count as what they hold
    plan = json.loads((first / "plan.json").read_text())
    assert any(part["dtype"] == name for part in plan["kept"])
    train(build({**settings, "output": str(second)}))
    assert (first / "adapter" / "adapter_model.safetensors").read_bytes() == (
        second / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    merged = merge(first, tmp_path / "plain")
    assert merged.merge_error <= 1e-5
    assert merged.rounding_error <= 1e-5
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "plain"), dtype=torch.float32).eval()
    assert not hasattr(again.config, "quantization_config")
    tuned = load_model(folder, quant=name, adapter=first / "adapter")
    assert (logits(tuned) - again(input_ids=IDS).logits).abs().max() <= 1e-5 * logits(tuned).abs().max()

    for how in ({"onto": "original"}, {"requantize": True}):
        with pytest.raises(RunFolderError, match=r"KL [\d.e+-]+ nats, top-1 agreement"):
            merge(first, tmp_path / "other", **how)
        assert not (tmp_path / "other").exists()
        forced = merge(first, tmp_path / next(iter(how)), force=True, **how)
        assert forced.drift is not None
        assert 0 < forced.drift.kl < 5
        assert 0 < forced.drift.agreement <= 1
        assert forced.drift.loss_before == pytest.approx(done.held_out_loss_after, rel=1e-3)
    assert quants.name_of(load_model(tmp_path / "requantize")) == name
    assert quants.name_of(load_model(tmp_path / "onto")) == "none"


def test_refused_before_weights_are_read(folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The weights are broken here, so a message about the method shows that nobody looked at them."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(b"" if path.suffix == ".safetensors" else path.read_bytes())
    base = {"model": str(broken), "data": [str(data_file)], "precision": "fp32", "output": str(tmp_path / "run")}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"method": "full", "quant": "nf4"},
            "full does not go with quant nf4: it trains 21 weights that are",
        ),
        ({"method": "freeze", "quant": "int8"}, "freeze does not go with quant int8: it trains 14 weights"),
        ({"lora": {"init": "pissa"}, "quant": "nf4"}, "lora.init=pissa begins with singular vectors"),
        ({"lora": {"dora": True}, "quant": "int8"}, "lora.dora on int8 fails at the second step on a CPU"),
        ({"lora": {"save": ["down_proj"]}, "quant": "nf4"}, "weights that are quantized"),
        ({"method": "peft:LOHA", "quant": "nf4"}, "PEFT has no layers of this type for quantized weights"),
        ({"quant": {"kind": "fp4"}}, "settings of quant are given, but nothing is quantized"),
    ]
    for settings, message in cases:
        with pytest.raises((ConfigError, Problems), match=message):
            train(build({**base, **settings}))
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def off_by_their_kernels(theirs: Any, mine: Any) -> float:
    """Infinite where bitsandbytes refuses the shapes: on CPUs with AVX512-BF16 it packs weights anew for a product of
    its own, for multiples of 32 outputs alone."""
    try:
        return off(theirs(input_ids=IDS).logits, logits(mine))
    except AssertionError as refused:
        if has_avx512bf16() and "N must be divisible by block_n" in str(refused):
            return float("inf")
        raise


def test_quantize_writes_what_transformers_and_fitune_load(folder: Path, data_file: Path, tmp_path: Path) -> None:
    for name in ("nf4", "int8"):
        target = tmp_path / name
        done = quantize(folder, target, quant=name)
        assert done.bytes_after < done.bytes_before
        assert len(done.layers) == 21
        assert all(0 < layer.mean_error < layer.max_error * 3 < 0.5 for layer in done.layers)
        assert all(layer.outliers is not None and layer.outliers <= layer.inputs for layer in done.layers)
        assert len(json.loads((target / "quantization.json").read_text())) == 21
        assert "<svg" in (target / "quantization.html").read_text()
        theirs = AutoModelForCausalLM.from_pretrained(str(target)).eval()
        assert hasattr(theirs.config, "quantization_config")
        mine, direct = load_model(target), load_model(folder, quant=name)
        assert torch.equal(logits(mine), logits(direct))
        packed = [dict(model.state_dict()) for model in (theirs, mine)]
        assert packed[0].keys() == packed[1].keys()
        assert all(torch.equal(tensor, packed[1][key]) for key, tensor in packed[0].items())
        difference = off_by_their_kernels(theirs, mine)
        if quants.faults(mine):  # their kernel is wrong for these shapes on this machine, as the finding says
            assert difference > 1e-3
        else:
            assert difference < (
                1e-4 if name == "nf4" else 0.05
            )  # int8: their inputs are quantized, in evaluation only
        settings = {"model": str(target), "data": [str(data_file)], "max_steps": 2}
        run = train(build({**settings, "output": str(tmp_path / f"r-{name}")}))
        assert merge(run.run, tmp_path / f"m-{name}").merge_error <= 1e-5
        with pytest.raises(ModelError, match="is quantized already"):
            quantize(target, tmp_path / "twice")
        with pytest.raises(RunFolderError, match="nothing of yours is overwritten"):
            quantize(folder, target)
    with pytest.raises((ConfigError, Problems), match="this model is quantized already, as nf4"):
        train(build({"model": str(tmp_path / "nf4"), "data": [str(data_file)], "quant": "int8"}))


def test_what_others_pack_without_saying_how_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="holds a model quantized by gptq; quantization_config: bits None"):
        load_model(tmp_path)


def test_frozen_scales_are_watched_too(folder: Path) -> None:
    model = adapters.attach(load_model(folder, quant="nf4"), config_for("lora"))
    before = guards.fingerprint(model)
    _, layer = next(quants.layers(model))
    layer.weight.quant_state.absmax[0] += 1
    found = guards.frozen_intact(before, model, 0.0)
    assert found.level == "refuse"
    assert "scales" in found.text


def test_packed_bits_are_not_taken_for_nan(folder: Path) -> None:
    model = load_model(folder, quant=QuantOptions(name="nf4", storage="fp16"))
    model = adapters.attach(model, config_for("lora"))
    packed = [layer.weight for _, layer in quants.layers(model)]
    assert all(p.dtype == torch.float16 for p in packed)
    assert any(not bool(p.isfinite().all()) for p in packed)
    assert guards.nan_hidden(model, guards.probe(samples()), "flat").level == "ok"


def test_settings_reach_transformers() -> None:
    made = quants.find("nf4").settings(
        QuantOptions(name="nf4", kind="fp4", double=False, storage="bf16"), torch.float16, ["lm_head"]
    )
    assert isinstance(made, BitsAndBytesConfig)
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (made.bnb_4bit_compute_dtype, made.bnb_4bit_quant_storage) == (torch.float16, torch.bfloat16)
    assert made.llm_int8_skip_modules == ["lm_head"]
    with pytest.raises(ConfigError, match="quant 'nf5'"):
        quant_options("nf5")
    assert quant_options("fp4") == QuantOptions(name="nf4", kind="fp4")


def test_nothing_is_kept_of_what_goes_through_a_frozen_layer(folder: Path) -> None:
    """Autograd holds no input and no plain weight of quantized layers."""
    model: Any = adapters.attach(load_model(folder, quant="nf4"), config_for("houlsby")).train()
    frozen: list[tuple[str, Any]] = list(quants.layers(model))
    plain = {layer.in_features * layer.out_features for _, layer in frozen}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_sum(model, flat(samples(), range(5)))
    own = {id(p) for p in model.parameters()}
    assert not [t.shape for t in kept if t.numel() in plain and id(t) not in own and t.ndim == 2 and t.shape[0] > 40]
    assert isinstance(model.model.layers[0].self_attn.q_proj, Frozen)
    assert math.isfinite(float(loss_sum(ready(model), flat(samples(), range(5)))))


@pytest.mark.parametrize(
    ("kind", "plain", "packed"),
    [
        ("mamba", {"dt_proj", "x_proj", "out_proj"}, {"in_proj"}),  # the last two by its kernel for a GPU
        ("gemma3n_text", {"correction_coefs", "prediction_coefs"}, {"q_proj", "down_proj"}),
        ("rwkv", {"output", "value"}, {"key", "receptance"}),
        ("qwen3", set(), {"q_proj", "down_proj"}),
        ("bloom", set(), {"dense", "dense_4h_to_h"}),
    ],
)
def test_layers_whose_weight_the_model_reads_itself_stay_plain(kind: str, plain: set[str], packed: set[str]) -> None:
    """Found in the model's source: packed, it would read bytes."""
    found = {name.rpartition(".")[2] for name in quants.planned(every_type.model_of(kind), quant_options("nf4"))}
    assert packed <= found
    assert not plain & found


def test_facts_about_a_weight_are_not_its_values() -> None:
    source = "class A:\n def __init__(self):\n  self.a.weight.zero_()\n"
    source += " def forward(self, x):\n  x = x.to(self.b.weight.dtype)\n  return x @ self.c.weight.T + self.norm.bias"
    assert set(direct._read(ast.parse(source))) == {"c"}
