"""What notebooks are shown: label masks, attention, memory, numbers in few bits; and a model's template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fitune
from fitune import quant, show
from fitune.commands.demo import bundled
from fitune.core.errors import ConfigError
from fitune.memory.rules import rules
from fitune.show import AttentionMask
from support.command import run

MODEL = bundled() / "model"
ROWS: list[dict[str, Any]] = [
    {"instruction": "Who is the king?", "output": "Mira <b>."},
    {"instruction": "1 + 1?", "output": "2"},
]


def test_a_mask_has_ids_and_labels_as_others_write_them() -> None:
    found = show.mask(ROWS, model=MODEL, samples=2)
    for ids, labels in zip(found.ids, found.labels, strict=True):
        first = next(n for n, label in enumerate(labels) if label != -100)
        assert labels == [-100] * first + ids[first:]
        assert ids[-1] == 2  # the end is trained
    drawn = found._repr_html_()
    assert drawn.count(">-100<") == sum(labels.count(-100) for labels in found.labels)
    assert "&lt;|end|&gt;" in drawn
    assert "<b>" not in drawn
    loaded = show.mask(ROWS, model=fitune.load(MODEL), samples=2)
    assert (loaded.ids, loaded.labels) == (found.ids, found.labels)


def test_a_run_brings_its_own_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fitune.train(
        model=MODEL, data=ROWS * 4, output=tmp_path / "run", template="bloom", method="prompt", max_steps=1,
        val_share=0, sample_prompts=0,
    )  # fmt: skip
    assert show.mask(ROWS, model=done.run).template == "bloom"
    assert show.attention_mask(ROWS[1:], model=done.run).apart  # its virtual tokens are no columns
    code, out, err = run(["template", done.run], capsys, monkeypatch)
    assert code == 0, err
    assert out.startswith("template          bloom")
    with pytest.raises(ConfigError, match="paths beside a run"):
        show.mask("rows.jsonl", model=done.run)


def test_what_is_no_number_or_no_plan_is_refused() -> None:
    odd = (torch.ones(2) * 1j, torch.ones(2, device="meta"))
    for wrong in ([], "abc", [float("nan")], [float("inf"), 1.0], *odd):
        for rounding in (quant.absmax, quant.nf4):
            with pytest.raises(ConfigError, match="rounding to few bits"):
                rounding(wrong)
    nothing: Any = "plan"
    with pytest.raises(ConfigError, match="no plan"):
        show.memory(nothing)


def test_of_a_loaded_model_the_template_is_its_own() -> None:
    with pytest.raises(ConfigError, match="settings beside a run"):
        show.mask(ROWS, model=fitune.load(MODEL), template="alpaca")


def test_rows_of_a_flat_batch_are_apart() -> None:
    found = show.attention_mask(ROWS, model=MODEL)
    assert found.apart
    assert found.causal
    assert found._repr_html_().count("<rect") == len(found.names) ** 2
    assert show.positions(ROWS, model=MODEL).rows[0].count(0) == 2
    leaking = AttentionMask(found.names, found.bounds, np.ones_like(found.seen))
    assert not leaking.apart
    assert not leaking.causal


def test_a_picture_has_a_limit() -> None:
    with pytest.raises(ConfigError, match="a picture of attention"):
        show.attention_mask([{"instruction": "one " * 100, "output": "2"}], model=MODEL)


def test_memory_is_that_of_the_plans() -> None:
    plans = {name: fitune.plan(MODEL, method=name, max_length=32, gpu="8GB") for name in ("full", "lora")}
    full, lora = plans.values()
    whole, tensors = show.memory(full=full, lora=lora), show.memory(tensors=True, full=full, lora=lora)
    assert whole.needed == {name: plan.needed for name, plan in plans.items()}
    for name, plan in plans.items():
        assert tensors.needed[name] == plan.needed - sum(plan.outside.values())
    assert "gradients" in tensors._repr_html_()
    assert "over the course" in show.memory(lora)._repr_html_()
    with pytest.raises(ConfigError, match="no plan"):
        show.memory()


def test_numbers_in_few_bits() -> None:
    rounded = quant.absmax([0.1, -0.3, 0.25, 0.15, -0.05])
    assert rounded.values == [42, -127, 106, 64, -21]
    assert rounded.error <= rounded.scales[0] / 2 + 1e-12
    assert quant.absmax(torch.zeros(3)).values == [0, 0, 0]
    values = quant.nf4_values()
    assert (len(values), values[0], values[7], values[-1]) == (16, -1.0, 0.0, 1.0)
    four = quant.nf4(torch.linspace(-2, 2, 80))
    assert (len(four.values), len(four.scales)) == (80, 2)
    assert set(four.values) <= set(range(16))
    assert four.error < 0.4
    assert "stored" in four._repr_html_()


def test_a_models_own_weight_in_few_bits() -> None:
    """It is a parameter, and far larger than a page."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 100_000).reshape(1_000, 100).bfloat16())
    for rounding in (quant.absmax, quant.nf4):
        page = rounding(weight)._repr_html_()
        assert "the first 128 of 100,000 numbers" in page
        assert len(page) < 50_000


def test_the_template_of_a_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(["template", MODEL, "--question", "hello"], capsys, monkeypatch)
    assert code == 0, err
    for part in ("chat_template", "<|bos|> (1)", "<|end|> (2)", "has no place for tools", "what chat sends"):
        assert part in out
    code, out, err = run(["template", MODEL, "--template", "alpaca", "--json"], capsys, monkeypatch)
    assert code == 0, err
    seen = json.loads(out.splitlines()[-1])
    assert seen["name"] == "alpaca"
    first = seen["examples"][0]["samples"][0]
    assert [token["text"] for token in first if token["trained"]] == ["4", "<|end|>"]
    code, _, err = run(["template", MODEL, "--template", "alpacca"], capsys, monkeypatch)
    assert code == 2
    assert "did you mean 'alpaca'?" in err


def test_old_rules_stand_beside_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["plan", "llama-3.2-1b", "--method", "lora", "--max-length", "256", "--gpu", "24GB", "--precision", "bf16"]
    code, out, err = run([*given, "--explain", "--json"], capsys, monkeypatch)
    assert code == 0, err
    seen = json.loads(out.splitlines()[-1])
    batch, whole, split = seen["rules"]
    total, trained = seen["total"], seen["trainable"]
    assert batch["bytes"] == 6 * seen["rows"] * total
    assert whole["bytes"] == 16 * total
    assert split["bytes"] == 2 * (total - trained) + 16 * trained
    assert all(one["off"] == pytest.approx(one["bytes"] / seen["needed"] - 1) for one in seen["rules"])
    assert "rules of thumb beside this plan" in err
    assert [one.planned for one in rules(fitune.plan(MODEL, method="full", max_length=32, gpu="8GB"))].count(0) == 0
