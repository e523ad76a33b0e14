"""One contract for every method on every family, a test for each promise.

The tests of one case share its model (support/contract.py): what holds at the start comes first, then two steps, then
what holds of the trained model. pytest keeps the tests of a case together; a test that runs alone makes what it needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
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
from fitune.models import adapters, attached, families, methods
from fitune.models import quant as quants
from fitune.models.configs import without_weights
from fitune.models.interfaces import causal_lm
from fitune.models.load import load_model
from fitune.models.prepare import checkpoint_blocks
from fitune.models.switches import for_rows
from support import tiny
from support.contract import (
    IDS,
    KINDS,
    QUICK,
    REFUSED,
    VARIANTS,
    Case,
    State,
    apart,
    config_for,
    folder_of,
    gradients,
    logits,
    make_base,
    samples,
)

# The quick run tries every method on a rotary model and, in turn, on one more build (OTHERS: Conv1D, ALiBi, two
# streams), a further variant of it (FURTHER) in turn on one of the first two, and on nf4 all but those that go beside
# the weights in another form (BESIDE). On every model it tries FEW, two in turn of one for each part of a model that a
# method goes on. What a family may do otherwise with blocks that are frozen or with embeddings is tried on gemma2 as
# well, which scales its embeddings. What the tables refuse on one of these builds costs nothing and is always tried.
FURTHER = (
    "freeze-tensors", "freeze-patterns", "tail-interleaved", "tail-mlp", "prompt-random", "p-tuning-lstm",
    "prefix-projected", "pfeiffer", "parallel", "lora-dora", "lora-pissa", "peft:LOHA",
)  # fmt: skip
BESIDE = ("tail-interleaved", "tail-mlp", "prompt-random", "p-tuning-lstm", "prefix-projected", "pfeiffer", "parallel")
OTHERS = ("gpt2", "bloom", "chatglm")
BUILDS = ("llama", *OTHERS)
FEW = (("lora-all", "tail"), ("prefix", "houlsby"))  # in turn
ALSO = {("freeze", "gemma2"), ("prompt", "gemma2")}
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
    """Every combination that the tables above do not refuse; the quick run has one of each kind. Two layers of 16 bits
    are not tried with int8: the path is nf4's."""
    for case, quick in combinations():
        if not refusal(case):
            yield pytest.param(case, id=str(case), marks=[] if quick else pytest.mark.full)


def refused() -> Iterator[Any]:
    """Those that the tables refuse, and those where the model decides."""
    for case, quick in combinations():
        if refusal(case) or (case.quant != "none" and case.variant == "freeze-tensors"):
            yield pytest.param(case, id=str(case), marks=[] if quick else pytest.mark.full)


def few_of(kind: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """Of FEW those that are tried on a model: two in turn; all where no other model is."""
    if kind not in kinds:
        return ()
    return (*FEW[0], *FEW[1]) if len(kinds) == 1 else FEW[kinds.index(kind) % 2]


def builds_of(variant: str, precision: str, quant: str) -> tuple[str, ...]:
    """The models that the quick run tries a method on, by the comment above."""
    if (precision, quant) == ("fp32", "nf4"):  # other forms of what goes beside the weights change nothing there
        return () if variant in BESIDE else BUILDS[:1]
    if (precision, quant) != ("fp32", "none"):
        return ()
    if variant in FURTHER:
        return (in_turn(variant, FURTHER, BUILDS[:2]),)
    return (BUILDS[0], in_turn(variant, [name for name in VARIANTS if name not in FURTHER], OTHERS))


def in_turn(variant: str, variants: Sequence[str], kinds: Sequence[str]) -> str:
    """One of the kinds that take the variant, another one for the next variant."""
    taken = [kind for kind in kinds if (variant, kind) not in REFUSED]
    return taken[variants.index(variant) % len(taken)]


def combinations() -> Iterator[tuple[Case, bool]]:
    whole = os.environ.get("FITUNE_TESTS") == "full"  # `make test-full`; else these would only be collected
    for variant, kind in product(VARIANTS, KINDS):
        for precision, quant in (("fp32", "none"), *QUICK):
            plain = (precision, quant) == ("fp32", "none")
            few = variant in few_of(kind, QUICK.get((precision, quant), KINDS))
            few |= plain and ((variant, kind) in ALSO or (kind in BUILDS and (variant, kind) in REFUSED))
            quick = few or kind in builds_of(variant, precision, quant)
            if quick or whole:
                yield Case(variant, kind, precision, quant), quick


def test_every_method_and_every_family_is_in_the_quick_run() -> None:
    quick = {case for case, is_quick in combinations() if is_quick and not refusal(case)}
    assert {case.variant for case in quick} == set(VARIANTS)
    assert {case.kind for case in quick} == set(KINDS)
    assert {(case.precision, case.quant) for case in quick} == {("fp32", "none"), *QUICK}
    several = [name for name in VARIANTS if name not in FURTHER and (name, BUILDS[0]) not in REFUSED]
    assert all(len({case.kind for case in quick if case.variant == name}) > 1 for name in several)


def refusal(case: Case) -> str | None:
    """Why it is refused, by the tables."""
    if case.quant != "none":
        reason = NOT_QUANTIZED.get((case.variant, case.quant), NOT_QUANTIZED.get((case.variant, "any")))
        if reason is not None:
            return reason
    return REFUSED.get((case.variant, case.kind))


@pytest.fixture(scope="module")
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    """The model of a case, made once for its tests."""
    case: Case = request.param
    reason = quant_problem(case)
    if reason is not None:  # what the last tensors are differs: in some models norms, which may be trained
        assert case.variant == "freeze-tensors", reason
        pytest.skip(f"refused: {reason}")
    folder = tmp_path_factory.mktemp("contract")
    yield State(case, folder)
    shutil.rmtree(folder)


every_case = pytest.mark.parametrize("state", list(cases()), indirect=True)
merged_cases = pytest.mark.parametrize(
    "state", [case for case in cases() if case.values[0].precision == "fp32"], indirect=True
)


@pytest.mark.parametrize("case", list(refused()))
def test_what_is_refused_is_refused_with_its_reason(case: Case) -> None:
    reason = quant_problem(case)
    if case.variant == "freeze-tensors" and case.quant != "none":
        assert reason is None or "those have no gradient" in reason
    elif reason is not None:
        assert str(refusal(case)) in reason
    elif case.variant.startswith("peft:") and case.quant != "none":  # PEFT 0.18 has more layers of quantized weights
        assert State(case).trained() is not None
    else:
        with pytest.raises(ConfigError, match=REFUSED[case.variant, case.kind]):
            State(case).start()


@every_case
def test_counts(state: State) -> None:
    """What is trained is, by name and size, the closed form, and float32."""
    found = modelchecks.trainable_set(state.start(), state.expected)
    assert found.level == "ok", found.text


@every_case
def test_zero_change_at_start(state: State) -> None:
    """Nothing changes at the start where that is promised."""
    model = state.start()
    if state.method.same_at_start:
        exact = 0.0 if state.case.precision == "fp32" else state.close
        limit = max(state.close, 1e-5) if "pissa" in state.case.variant else exact
        assert apart(logits(model), state.before, state.case.precision) <= limit


@every_case
def test_flat_is_separate(state: State) -> None:
    """A flat batch is the same as separate documents, in the method's own forward."""
    two = [s for s in samples() if len(s) > 1]
    layout, finding = leak.packing_leak(state.start(), two, "flat")
    assert layout == "flat", finding.text
    documents_are_apart(state.start(), state.case)


@every_case
def test_gradients(state: State) -> None:
    """A finite gradient reaches every trainable tensor, and the same one with checkpointing."""
    model = state.start()
    plain = gradients(model)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())
    checkpoint_blocks(model, state.family, True)
    for name, gradient in gradients(model).items():
        size = max(float(plain[name].abs().max()), 1e-6)
        limit = 1e-6 if state.case.precision == "fp32" else state.close
        assert (gradient - plain[name]).abs().max() <= limit * size, name


@every_case
def test_two_steps_change_what_is_trained_and_nothing_else(state: State) -> None:
    """Every trainable tensor has changed, and every frozen one is bit-identical; documents stay apart."""
    model = state.trained()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state.tensors[name]) != parameter.requires_grad, name
    assert (state.after - state.before).abs().max() > 1e-3
    documents_are_apart(model, state.case)


@every_case
def test_saved_is_loaded(state: State) -> None:
    """What is saved and loaded again has the same logits, and turned off it is the base; PEFT loads what it knows."""
    loaded, case = state.loaded(), state.case
    assert all(path.suffix in (".safetensors", ".json", ".md") for path in state.saved.iterdir())
    if "pissa" in case.variant:  # saved as a plain LoRA of twice the rank
        assert apart(logits(loaded), state.after, case.precision) <= max(state.close, 1e-4)
    else:
        assert torch.equal(logits(loaded), state.after)
    with adapters.disabled(loaded):
        assert torch.equal(logits(loaded), state.before)
        layout, finding = leak.packing_leak(loaded, [s for s in samples() if len(s) > 1], "flat")
        assert layout == "flat", finding.text
    assert apart(logits(loaded), state.after, case.precision) <= max(state.close, 1e-4)
    if isinstance(loaded, PeftModel):
        base = make_base(case.kind, case.precision, quant=case.quant)
        theirs = PeftModel.from_pretrained(base, str(state.saved)).eval()
        attached.of(theirs).compute = attached.of(loaded).compute
        if "LOHA" in case.variant:  # whose products are made in another order here
            assert apart(logits(theirs), logits(loaded), case.precision) <= max(state.close, 1e-5)
        else:
            assert torch.equal(logits(theirs), logits(loaded))


@merged_cases
def test_merged(state: State, tmp_path: Path) -> None:
    """It merges into a plain model with the same logits, or says why not."""
    loaded, variant = state.loaded(), state.case.variant
    problem = state.method.merge_problem(causal_lm(loaded), state.family, state.config)
    if problem is not None or variant.startswith(("peft:", "prompt")):
        if not variant.startswith("peft:"):
            with pytest.raises(RunFolderError, match=r"cannot be merged: .{10}"):
                merged(loaded, state.family, state.config)
        return
    if state.case.quant != "none":  # with the values that it was tuned on
        loaded = load_model(folder_of(state.case.kind), quant=state.case.quant, plain=True, adapter=state.saved)
        assert not any(True for _ in quants.layers(loaded))
    exact_logits = in_float64(loaded)
    done = merged(loaded, state.family, state.config)
    done.save_pretrained(str(tmp_path / "plain"))
    tiny.make_tokenizer().save_pretrained(str(tmp_path / "plain"))
    again = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "plain"), dtype=torch.float32, attn_implementation=for_rows(done)
    )  # which transformers 5.17 does not choose by itself for Gemma 2
    # in float64 only what merging rounded is left: each merged weight, once
    limit = 1e-5 * max(1.0, float(state.after.abs().max()))
    assert (in_float64(again) - exact_logits).abs().max() <= limit


def documents_are_apart(model: Any, case: Case) -> None:
    """What a change of one document moves in another is nothing, and a flat batch is what separate documents give."""
    model.eval()
    two = [s for s in samples() if len(s) > 1]
    with torch.no_grad():
        seen = leak._leak(model, two, "flat")
    assert seen.moved <= 1e-6
    if seen.difference > LEAK[case.precision] and case.precision != "fp32" and case.quant == "none":
        # two steps at a large rate may leave a model that magnifies what 16 bits round: then without that rounding
        wide = deepcopy(model).float()
        attached.of(wide).compute = torch.float32
        with torch.no_grad():
            seen = leak._leak(wide, two, "flat")
        assert seen.allowed == leak.TOLERANCE[torch.float32]
        assert seen.difference <= LEAK["fp32"]
        return
    assert seen.difference <= LEAK[case.precision]


def quant_problem(case: Case) -> str | None:
    """What the method says of quantized weights of this model; none of it needs the weights to be read."""
    if case.quant == "none":
        return None
    config = config_for(case.variant, case.precision, quant=case.quant)
    shape = without_weights(tiny.make_model(case.kind).config)
    there = methods.Quantized(quants.planned(shape, config.quant), case.quant, "cpu")
    return methods.find(config.method).quant_problem(shape, families.of(shape), config, there)


def in_float64(model: Any) -> torch.Tensor:
    """Logits whose sums round nothing, so that they do not depend on the order that a machine adds in."""
    with torch.no_grad():
        return deepcopy(model).double().eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


LEAK = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}  # of the worst logits: two ways to the same


def test_load_model_does_it_all_from_a_folder(tmp_path: Path) -> None:
    folder = tiny.save("bloom", tmp_path / "model")
    model = adapters.attach(load_model(folder), config_for("houlsby"))
    adapters.save(model, tmp_path / "saved")
    loaded = load_model(folder, adapter=tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(load_model(folder)))
