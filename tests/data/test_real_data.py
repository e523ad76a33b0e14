"""Real data with real tokenizers, on tiny random models: every file is trained on for a few steps.

The quick run has every file and every tokenizer at least once, of each file 60 rows; `make test-full` has each with
each, whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.checks import datachecks
from fitune.commands.prepare import prepare
from fitune.commands.request import to_train
from fitune.core.config import build
from fitune.core.events import Silent
from fitune.data import tokenizer as tokenizers
from fitune.engine.step import training_step
from support.command import run

pytestmark = pytest.mark.shared

ADVERTISE = {"map": {"content": "prompt", "summary": "completion"}}
FILES: dict[str, dict[str, Any]] = {
    "alpaca_zh_demo.json": {},
    "alpaca_en_demo.json": {},
    "alpaca_zh_20k": {"take": [600], "skip_bad": True},  # some of its answers are empty
    "identity.json": {"fill": {"name": "小调", "author": "fitune"}},
    "advertisegen_dev/dev.json": ADVERTISE,
    "advertisegen_dev/dev_chatml.json": {},
    "glaive_toolcall_zh_demo.json": {},
    "glaive_toolcall_en_demo.json": {},
    "dpo_zh_demo.json": {},
}
SHARE: dict[str, Any] = {} if os.environ.get("FITUNE_TESTS") == "full" else {"take": [60]}
TOKENIZERS = {"llama2": 32000, "qwen2": 151936, "gpt2": 50257, "chatglm1": 130528, "chatglm2": 65024}
HAS_TOOLS = ("qwen", "chatglm3")
QUICK = {
    ("alpaca_zh_demo.json", "chatglm1"),
    ("alpaca_en_demo.json", "gpt2"),
    ("identity.json", "qwen2"),
    ("advertisegen_dev/dev.json", "chatglm2"),
    ("advertisegen_dev/dev_chatml.json", "llama2"),
    ("glaive_toolcall_zh_demo.json", "chatglm2"),
    ("dpo_zh_demo.json", "llama2"),
}
CASES = [
    pytest.param(file, words, marks=[] if (file, words) in QUICK else pytest.mark.full, id=f"{file}-{words}")
    for file in FILES
    for words in TOKENIZERS
]


def template_for(file: str, words: str) -> str:
    """Tool calls need a template that has a place for them."""
    if "toolcall" not in file:
        return "auto"
    return "chatglm3" if words == "chatglm2" else "qwen"


def make_model(folder: Path, vocabulary: int, source: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    for path in source.iterdir():
        if path.name != "SOURCE.txt":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(("file", "words"), CASES)
def test_every_file_trains_with_every_tokenizer(shared: Path, tmp_path: Path, file: str, words: str) -> None:
    model = make_model(tmp_path / "model", TOKENIZERS[words], shared / "tokenizers" / words)
    settings = {"model": str(model), "data": [str(shared / "data" / file)], "template": template_for(file, words)}
    config = build(
        {**settings, **SHARE, **FILES[file], "batch_size": 2, "max_steps": 3, "output": str(tmp_path / "run")}
    )
    job = prepare(to_train(config), Silent())
    found = {finding.rule: finding for finding in job.findings}
    assert found["eos-supervised"].level == "ok"
    assert found["label-border"].level == "ok"
    assert found["template-parity"].level == "ok"
    assert job.report.skipped_bad == (11 if file == "alpaca_zh_20k" else 0)
    optimizer = torch.optim.AdamW([p for p in job.tuned.model.parameters() if p.requires_grad], lr=1e-2)
    losses = [training_step(job.tuned.model, micro, optimizer, 1.0).loss for _, micro in job.loader.steps(0, 3)]
    assert all(np.isfinite(losses))
    # a random model knows nothing: its loss is that of guessing
    assert losses[0] == pytest.approx(np.log(TOKENIZERS[words]), rel=0.05)


@pytest.mark.full
def test_no_rule_raises_a_false_alarm_on_real_data(shared: Path, tmp_path: Path) -> None:
    quiet = ("eos-supervised", "double-bos", "template-parity", "label-border", "padding-side", "id-range", "bad-row")
    for number, (file, words) in enumerate(sorted(QUICK)):
        model = make_model(tmp_path / str(number), TOKENIZERS[words], shared / "tokenizers" / words)
        settings = {"model": str(model), "data": [str(shared / "data" / file)], "template": template_for(file, words)}
        job = prepare(to_train(build({**settings, **FILES[file], "output": str(tmp_path / "run")})), Silent())
        levels = {f.rule: f.level for f in job.findings}
        right = {"bad-row": "warn"} if file == "alpaca_zh_20k" else {}  # eleven of its answers are empty
        assert {rule: levels[rule] for rule in quiet} == {**dict.fromkeys(quiet, "ok"), **right}, file


def test_the_rule_of_thumb_alone_would_cut_many_answers(shared: Path) -> None:
    folder = shared / "tokenizers" / "qwen2"
    config = build({"model": str(folder), "data": [str(shared / "data" / "alpaca_zh_demo.json")]})
    report = datachecks.read(config, folder, tokenizers.load(folder), limit=4096, vocabulary=TOKENIZERS["qwen2"]).report
    choices = {choice.name: choice for choice in report.length_choices}
    assert 0.11 <= choices["rule of thumb"].lose_answer <= 0.25
    assert choices["auto"].lose_answer <= 0.01
    assert report.max_length == choices["auto"].max_length


def test_a_tokenizer_that_splits_unlike_its_sentencepiece_file_is_named(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    words = tokenizers.load(folder)
    assert tokenizers.parity(folder, words, ["Once upon a time"]) == []
    found = tokenizers.parity(folder, words, ["    return"])
    if not found:
        pytest.skip("this version of transformers splits repeated spaces as sentencepiece does")
    assert found[0].text == "    return"


def test_stories260k_learns_from_real_rows(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, with its JSON: a real pretrained model, real rows, held-out loss falls."""
    arguments = ["--model", shared / "models" / "stories260K", "--data", shared / "data" / "alpaca_en_demo.json"]
    arguments += ["--method", "lora", "--output", tmp_path / "run", "--batch-size", 4, "--max-length", 256]
    arguments += [
        "--max-steps",
        12,
        "--lr",
        "3e-3",
        "--seed",
        1,
        "--set",
        "val_rows=20",
        "--set",
        "sample_tokens=8",
        "--json",
    ]
    code, out, error = run(["train", *arguments], capsys, monkeypatch)
    assert code == 0, error
    result = json.loads(out)
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.2
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "template.json").read_text())["name"] == "alpaca"
