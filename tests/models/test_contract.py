"""One contract for every method on every family: see each check's own text."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fitune.checks import leak, modelchecks
from fitune.commands.merge import merged
from fitune.core.errors import ConfigError, RunFolderError
from fitune.data.batches import flat
from fitune.engine import optim
from fitune.engine.step import training_step
from fitune.models import adapters, attached, families, methods
from fitune.models import quant as quants
from fitune.models.configs import without_weights
from fitune.models.interfaces import causal_lm
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import checkpoint_blocks, ready
from support import tiny
from support.contract import (
    IDS,
    KINDS,
    QUICK,
    REFUSED,
    VARIANTS,
    apart,
    config_for,
    folder_of,
    gradients,
    logits,
    make_base,
    samples,
)

LATER = (*tiny.MORE, "olmo2")  # of these the quick run tries a few methods only
FEW = ("full", "freeze", "lora", "lora-all", "prefix", "tail", "houlsby", "prompt")
# On quantized weights: why not. None of these needs the weights to be read.
NOT_QUANTIZED = {
    ("full", "any"): "weights that are quantized, and those have no gradient",
    ("freeze", "any"): "weights that are quantized, and those have no gradient",
    ("freeze-patterns", "any"): "weights that are quantized, and those have no gradient",
    ("lora-pissa", "any"): "begins with singular vectors",
    ("lora-dora", "int8"): "fails at the second step on a CPU",
    ("peft:LOHA", "any"): "PEFT has no layers of this type",
    ("peft:VERA", "any"): "PEFT has no layers of this type",
}


def cases() -> Iterator[Any]:
    """Every combination; the quick run has one of each kind. Two layers of 16 bits are not tried with int8: the path is
    nf4's."""
    for variant, kind in product(VARIANTS, KINDS):
        for precision, quant in (("fp32", "none"), *QUICK):
            plain = (precision, quant) == ("fp32", "none") and (kind not in LATER or variant in FEW)
            quick = plain or kind in QUICK.get((precision, quant), ())
            name = f"{variant}-{kind}-{precision}" + (f"-{quant}" if quant != "none" else "")
            marks = [] if quick else pytest.mark.full
            yield pytest.param(variant, kind, precision, quant, id=name, marks=marks)


def in_float64(model: Any) -> torch.Tensor:
    """Logits whose sums round nothing, so that they do not depend on the order that a machine adds in."""
    with torch.no_grad():
        return deepcopy(model).double().eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CLOSE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}  # of logits: two ways to the same
LEAK = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}  # of the worst of them


@pytest.mark.parametrize(("variant", "kind", "precision", "quant"), list(cases()))
def test_contract(variant: str, kind: str, precision: str, quant: str, tmp_path: Path) -> None:
    config = config_for(variant, precision, quant=quant)
    method = methods.find(config.method)
    method.check(config)
    if quant != "none":
        shape = without_weights(tiny.make_model(kind).config)
        there = methods.Quantized(quants.planned(shape, config.quant), quant, "cpu")
        reason = method.quant_problem(shape, families.of(shape), config, there)
        expected_reason = NOT_QUANTIZED.get((variant, quant), NOT_QUANTIZED.get((variant, "any")))
        if variant == "freeze-tensors":  # what the last tensors are differs: in some models norms, which may be trained
            expected_reason = reason and "those have no gradient"
        assert (reason is None) == (expected_reason is None), reason
        if reason is not None:
            assert expected_reason in reason
            return
    base = make_base(kind, precision, method, quant)
    family = families.of(base)
    if (variant, kind) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[variant, kind]):
            adapters.attach(base, config)
        return
    close = CLOSE[precision]
    exact = 0.0 if precision == "fp32" else close
    before = logits(base)
    expected = method.expected(base, family, config)
    model = adapters.attach(base, config)

    # what is trained is, by name and size, the closed form, and float32
    found = modelchecks.trainable_set(model, expected)
    assert found.level == "ok", found.text
    # nothing changes at the start where that is promised
    if method.same_at_start:
        assert apart(logits(model), before, precision) <= (max(close, 1e-5) if "pissa" in variant else exact)
    # a flat batch is the same as separate documents, in the method's own forward
    two = [s for s in samples() if len(s) > 1]
    layout, finding = leak.packing_leak(model, two, "flat")
    assert layout == "flat", finding.text
    model.eval()
    with torch.no_grad():
        seen = leak._leak(model, two, "flat")
    assert seen.difference <= LEAK[precision]
    assert seen.moved <= 1e-6

    # a finite gradient reaches every trainable tensor, and the same one with checkpointing
    plain = gradients(model)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())
    checkpoint_blocks(model, family, True)
    for name, gradient in gradients(model).items():
        size = max(float(plain[name].abs().max()), 1e-6)
        assert (gradient - plain[name]).abs().max() <= (1e-6 if precision == "fp32" else close) * size, name

    # after two steps every trainable tensor has changed, and every frozen one is bit-identical
    start = state(model)
    optimizer = optim.make(trainable(model), config, lambda name: method.rates(config, name))
    optim.set_learning_rate(optimizer, 1e-2)
    model.train()
    for _ in range(2):
        training_step(model, [flat(samples(), range(5))], optimizer, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name

    # what was trained does not let documents see each other either
    model.eval()
    with torch.no_grad():
        seen = leak._leak(model, two, "flat")
    assert seen.difference <= LEAK[precision]
    assert seen.moved <= 1e-6

    # what is saved and loaded again has the same logits, and turned off it is the base
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    adapters.save(model, tmp_path / "saved")
    assert all(path.suffix in (".safetensors", ".json", ".md") for path in (tmp_path / "saved").iterdir())
    loaded = ready(make_base(kind, precision, method, quant), precision, tmp_path / "saved")
    if "pissa" in variant:  # saved as a plain LoRA of twice the rank
        assert apart(logits(loaded), after, precision) <= max(close, 1e-4)
    else:
        assert torch.equal(logits(loaded), after)
    with adapters.disabled(loaded):
        assert torch.equal(logits(loaded), before)
        layout, finding = leak.packing_leak(loaded, two, "flat")
        assert layout == "flat", finding.text
    assert apart(logits(loaded), after, precision) <= max(close, 1e-4)

    # PEFT loads what it knows, with the same logits
    if isinstance(loaded, PeftModel):
        theirs = PeftModel.from_pretrained(make_base(kind, precision, quant=quant), str(tmp_path / "saved")).eval()
        attached.of(theirs).compute = attached.of(loaded).compute
        assert torch.equal(logits(theirs), logits(loaded))

    # it merges into a plain model with the same logits, or says why not
    if precision != "fp32":
        return
    if method.merge_problem(causal_lm(loaded), family, config) is not None or variant.startswith(("peft:", "prompt")):
        if not variant.startswith("peft:"):
            with pytest.raises(RunFolderError, match=r"cannot be merged: .{10}"):
                merged(loaded, family, config)
        return
    if quant != "none":  # with the values that it was tuned on
        loaded = load_model(folder_of(kind), quant=quant, plain=True, adapter=tmp_path / "saved")
        assert not any(True for _ in quants.layers(loaded))
    exact_logits = in_float64(loaded)
    done = merged(loaded, family, config)
    done.save_pretrained(str(tmp_path / "plain"))
    tiny.make_tokenizer().save_pretrained(str(tmp_path / "plain"))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "plain"), dtype=torch.float32)
    # in float64 only what merging rounded is left: each merged weight, once
    assert (in_float64(again) - exact_logits).abs().max() <= 1e-5 * max(1.0, float(after.abs().max()))


def test_load_model_does_it_all_from_a_folder(tmp_path: Path) -> None:
    folder = tiny.save("bloom", tmp_path / "model")
    model = adapters.attach(load_model(folder), config_for("houlsby"))
    adapters.save(model, tmp_path / "saved")
    loaded = load_model(folder, adapter=tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(load_model(folder)))
