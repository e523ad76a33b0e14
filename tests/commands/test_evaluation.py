"""Figures of held-out rows: by hand, beside the base, and for Chinese by character."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fitune
from fitune.cli import main as cli
from fitune.commands.demo import bundled
from fitune.commands.evaluate import evaluate
from fitune.commands.scores import Judged, bleu4, exact_match, rouge_l, scores_of
from fitune.commands.train import train
from fitune.commands.verdict import Judging, knows, verdict
from fitune.core.config import build
from fitune.core.errors import FituneError
from fitune.core.files import read_summed, with_own_sum, write_json
from fitune.core.options import DataSource
from fitune.core.records import Conversation, Finding, Message, ToolCall
from fitune.core.verdict import Verdict
from fitune.data import tokenizer
from fitune.data.encode import Encoder
from fitune.data.templates import choose
from fitune.models import families
from fitune.models.kernels import frozen_head
from fitune.models.kernels import loss as loss_kernel
from fitune.models.load import Tuned
from support import command, tiny


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    data = tiny.write_rows(folder / "rows.jsonl", 30)
    held_out = tiny.write_rows(folder / "held_out.jsonl", 9)
    values = {"model": str(model_folder), "data": [str(data)], "eval_data": [str(held_out)], "sample_prompts": 0}
    train(build({**values, "output": str(folder / "run"), "max_steps": 8, "lr": 1e-2}))
    return folder / "run"


@pytest.fixture(scope="module")
def twin(run: Path) -> Path:
    """Another run with the same result."""
    folder = shutil.copytree(run, run.with_name("twin"))
    seal = read_summed(folder / "seal.json")
    assert seal is not None
    seal["identity"]["id"] = "0" * 32
    write_json(folder / "seal.json", with_own_sum(seal))
    return folder


def test_bleu_and_rouge_by_hand() -> None:
    assert bleu4(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    assert bleu4(["今天天气真好啊"], ["今天天气真好啊"]) == pytest.approx(100)
    assert 0 < bleu4(["今天天气真好啊"], ["今天天气很好啊"]) < 100  # by character: as words nothing would match
    assert bleu4(["x y z"], ["今天天气真好"]) == 0
    # longest common subsequence 3 of 4 and 3 of 3 units: P = 3/4, R = 1, F = 6/7
    assert rouge_l(["今天很好"], ["今天好"]) == pytest.approx(6 / 7)
    assert rouge_l(["the big cat"], ["the cat"]) == pytest.approx(0.8)
    assert rouge_l(["a", "b"], ["a", "c"]) == pytest.approx(0.5)


def test_a_run_is_measured_beside_its_base(run: Path, model_folder: Path) -> None:
    held_out = str(run.parent / "held_out.jsonl")
    found = evaluate(run, [held_out], max_new_tokens=6, samples=2)
    done = json.loads((run / "result.json").read_text())
    assert (found.rows, found.asked, found.too_long) == (9, 9, 0)
    assert found.scores.loss == pytest.approx(done["held_out_loss_after"], abs=1e-5)
    assert found.base is not None
    assert found.base.loss == pytest.approx(done["held_out_loss_before"], abs=1e-5)
    assert found.scores.perplexity == pytest.approx(math.exp(found.scores.loss))
    assert len(found.samples) == 2
    plain = evaluate(model_folder, [held_out], answer=False)
    assert plain.base is None
    assert plain.scores.exact_match is None
    assert plain.scores.loss == pytest.approx(found.base.loss, abs=1e-5)
    assert fitune.evaluate(run, [held_out], answer=False).scores.loss == found.scores.loss


def test_right_answers_count(run: Path, tmp_path: Path) -> None:
    """Rows whose expected answers are what the model says: everything is at its best."""
    asked = [row["messages"][0]["content"] for row in tiny.rows(4)]
    answers = [fitune.generate(run, question, max_new_tokens=12) for question in asked]
    data = tmp_path / "rows.jsonl"
    pairs = [(q, a) for q, a in zip(asked, answers, strict=True) if a.strip()]
    assert pairs
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs), encoding="utf-8")
    found = evaluate(run, [str(data)], max_new_tokens=12)
    assert found.scores.exact_match == 1.0
    assert found.scores.rouge_l == pytest.approx(1.0)


def test_logits_of_a_set_are_never_held(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded fault: more of them at once than as many rows have."""
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", 4 * 400 * 5)  # five rows, of which a power of two is taken
    seen: list[int] = []
    see = frozen_head._Rows.add

    def watched(self: Any, start: int, weight: torch.Tensor, bias: Any) -> None:
        seen.append(len(self.hidden) * len(weight))
        see(self, start, weight, bias)

    monkeypatch.setattr(frozen_head._Rows, "add", watched)
    clean = ("flat", Finding("packing-leak", "ok", ""))  # the probe scores two short documents whole
    monkeypatch.setattr("fitune.checks.leak.packing_leak", lambda *_: clean)
    evaluate(run, [str(run.parent / "held_out.jsonl")], answer=False)
    assert len(seen) > 5
    assert max(seen) <= 4 * 400


def test_eval_on_the_command_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["eval", run, "--data", run.parent / "held_out.jsonl", "--max-new-tokens", 4, "--take", 5, "--json"]
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == 5
    for word in ("base", "tuned", "perplexity", "bleu4", "rouge l"):
        assert word in err


def test_rows_that_the_template_cannot_write_are_refused_not_left_out(tmp_path: Path) -> None:
    """They have no sample: figures of the others would be shown as figures of all."""
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    tool = [*turns[:1], {"role": "tool", "content": "{}"}, *turns[1:]]
    data = tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (turns, tool, tool)))
    with pytest.raises(FituneError, match=r"held_out.jsonl:2: .* no place for tool results \(and 1 more row\)"):
        evaluate(bundled() / "model", [str(data)], answer=False)


def test_bad_rows_are_left_out_where_that_is_asked_for_and_counted(tmp_path: Path) -> None:
    """A row that cannot be read, and one that the template cannot write; the figures are those of the others alone."""
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    tool = [*turns[:1], {"role": "tool", "content": "{}"}, *turns[1:]]
    data, good = tmp_path / "held_out.jsonl", tmp_path / "good.jsonl"
    lines = [json.dumps({"messages": one}) + "\n" for one in (turns, tool, turns)]
    data.write_text("".join([*lines, '{"messages": 3}\n']))
    good.write_text("".join([lines[0], lines[2]]))
    with pytest.raises(FituneError, match="--skip-bad"):
        evaluate(bundled() / "model", [str(data)], answer=False)
    found = evaluate(bundled() / "model", [str(data)], answer=False, skip_bad=True)
    alone = evaluate(bundled() / "model", [str(good)], answer=False)
    assert (found.rows, found.left_out) == (2, 2)
    assert (alone.rows, alone.left_out) == (2, 0)
    assert found.scores == alone.scores
    assert found.target_tokens == alone.target_tokens
    data.write_text(lines[1])
    with pytest.raises(FituneError, match="no place for tool results"):
        evaluate(bundled() / "model", [str(data)], answer=False, skip_bad=True)


@pytest.mark.shared
def test_advertisegen_with_a_real_model(shared: Path) -> None:
    found = evaluate(
        shared / "models" / "stories260K", [str(shared / "data" / "advertisegen_dev" / "dev.json")], take=6,
        columns={"content": "prompt", "summary": "completion"}, max_new_tokens=8,
    )  # fmt: skip
    assert found.rows == 6
    assert found.scores.loss > 1
    assert found.scores.bleu4 is not None


# ---- answers in a frame ----

TAGS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "[CALLS]"]
CALL = "{%- for c in m.tool_calls or [] -%}{{ '[CALLS]' + (c.function | tojson) }}{%- endfor -%}"
LAST = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' and loop.last -%}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif -%}{{ m.content }}" + CALL +
    "{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)  # fmt: skip
OPENED = LAST.replace("assistant\\n' }}{%- endif -%}", "assistant\\n<think>\\n' }}{%- endif -%}")
BARE = LAST.replace("{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}", "")
TEMPLATES = {"last turn thinks": LAST, "thought opened": OPENED, "thoughts in the text": BARE, "chatml": "chatml"}
CAPITAL = "the capital is Mira"


def framed(name: str, *, special: bool = True) -> Tuned:
    """A tiny model whose template puts a frame around answers. special: are the tags special tokens."""
    words = tiny.make_tokenizer([*tiny.SPECIAL, *(TAGS if special else TAGS[:2])])
    template = TEMPLATES[name]
    words.chat_template = template if "{" in template else None
    shape = choose("chat_template" if "{" in template else template, words)
    model = tiny.make_model("llama")
    return Tuned(model, words, shape, Encoder(words, shape), families.of(model))


def answer_perfectly(monkeypatch: pytest.MonkeyPatch, tuned: Tuned, rows: list[Conversation], cut: int = 0) -> None:
    """The model writes what it would be trained to write; `cut`: but for so many ids at the end."""

    def generate(tuned: Tuned, prompts: list[list[int]], *_: object, **__: object) -> list[list[int]]:
        samples = [list(map(int, tuned.encoder.samples(row)[-1].ids)) for row in rows]
        assert all(sample[: len(prompt)] == prompt for sample, prompt in zip(samples, prompts, strict=True))
        made = [sample[len(prompt) :] for sample, prompt in zip(samples, prompts, strict=True)]
        return [ids[: len(ids) - cut] for ids in made]

    monkeypatch.setattr("fitune.engine.generation._generate", generate)


def asked(answer: Message) -> Conversation:
    return Conversation((Message("user", "the capital?"), answer))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_perfect_answers_are_right_whatever_frame_they_stand_in(
    name: str, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = framed(name, special=special)
    messages = [
        Message("assistant", CAPITAL),
        Message("assistant", f"<think>\nit is in the north\n</think>\n\n{CAPITAL}"),
    ]
    if name in ("last turn thinks", "thought opened"):
        messages.append(Message("assistant", CAPITAL, thought="two plus three"))
    rows = [asked(message) for message in messages]
    answer_perfectly(monkeypatch, tuned, rows)
    judged = exact_match(tuned, rows)
    assert [one.expected for one in judged] == [CAPITAL] * len(rows)
    scores = scores_of(1.0, judged)
    assert scores.exact_match == 1.0
    assert scores.rouge_l == pytest.approx(1.0)
    assert scores.bleu4 == pytest.approx(100)
    assert scores.thoughts == pytest.approx((len(rows) - 1) / len(rows))
    assert scores.thought_match == 1.0
    assert [one.thought for one in judged][:2] == ["", "it is in the north"]


@pytest.mark.parametrize("name", ["last turn thinks", "thought opened"])
def test_a_thought_that_is_not_closed_is_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the expected text stands in the thought."""
    tuned = framed(name)
    rows = [asked(Message("assistant", CAPITAL, thought=CAPITAL))]
    count = len(tokenizer.encode(tuned.tokenizer, f"\n</think>\n\n{CAPITAL}", literal=True))
    answer_perfectly(monkeypatch, tuned, rows, cut=count + 1)
    (judged,) = exact_match(tuned, rows)
    assert judged.answer == ""
    assert CAPITAL.startswith(judged.thought)
    assert judged.thought
    assert scores_of(1.0, [judged]).exact_match == 0.0


def test_calls_and_thoughts_are_figures_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = framed("last turn thinks")
    call = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Mira"}'),))
    rows = [asked(Message("assistant", "two plus three", thought="it is five")), asked(call)]
    answer_perfectly(monkeypatch, tuned, rows)
    judged = exact_match(tuned, rows)
    assert scores_of(1.0, judged).call_match == 1.0
    wrong = [replace(judged[0], thought="it is two"), replace(judged[1], answer=judged[1].answer + "x")]
    scores = scores_of(1.0, wrong)
    assert (scores.exact_match, scores.thought_match, scores.call_match) == (1.0, 0.0, 0.0)
    plain = scores_of(1.0, [Judged("q", "a", "a")])
    assert (plain.thoughts, plain.thought_match, plain.call_match) == (None, None, None)


def test_thinking_models_are_evaluated_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder, on the command line: perfect answers score 100 %, where they scored nothing."""
    tuned = framed("last turn thinks")
    tuned.model.save_pretrained(tmp_path / "model")
    tuned.tokenizer.save_pretrained(tmp_path / "model")
    rows = [asked(Message("assistant", CAPITAL, thought="it is in the north"))]
    messages = [
        {"role": "user", "content": "the capital?"},
        {"role": "assistant", "content": CAPITAL, "reasoning_content": "it is in the north"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    answer_perfectly(monkeypatch, tuned, rows)
    arguments = ["eval", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--json"]
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert json.loads(out)["scores"]["exact_match"] == 1.0
    assert json.loads(out)["scores"]["thought_match"] == 1.0
    assert "thought match" in err


# ---- verdicts ----


def _verdict(runs: list[Path], **how: Any) -> Verdict:
    return verdict(runs, Judging(max_new_tokens=4, **how))


def test_a_verdict_compares_row_by_row_what_eval_measures_together(run: Path) -> None:
    """The same losses as eval has, of the rows that the run held out; kinds by a column, else by language."""
    held_out = str(run.parent / "held_out.jsonl")
    measured = evaluate(run, [held_out], answer=False)
    found = _verdict([run], answer=False).runs[0]
    section, general = found.sections
    loss = section.kinds[0].changes[0]
    assert measured.base is not None
    assert (loss.base, loss.tuned) == pytest.approx((measured.base.loss, measured.scores.loss), abs=1e-6)
    assert loss.low < loss.difference < loss.high < 0
    assert (loss.better, section.outcome, section.kinds[0].rows) == (9, "better", 9)
    assert "no general checks" in general.note


def test_kinds_of_rows_and_general_checks_of_ones_own(run: Path, twin: Path, tmp_path: Path) -> None:
    rows = [{**row, "kind": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(tiny.rows(8))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = [DataSource(path=str(data))]
    found = _verdict([run, twin], data=sources, checks=sources)
    for one in found.runs:
        assert [kind.name for kind in one.sections[0].kinds] == ["all", "even", "odd"]
        assert [change.name for change in one.sections[1].kinds[0].changes] == ["loss", "exact match", "known"]
        assert one.sections[1].decides == ("loss",)  # a random base knows nothing
    assert found.together is not None
    assert found.together.sections[0].kinds == found.runs[0].sections[0].kinds
    assert json.loads(json.dumps(found.as_dict()))["runs"][1]["run"] == str(twin)
    again = fitune.verdict(run, [str(data)], checks=[str(data)], max_new_tokens=4)
    assert again.runs[0].sections == found.runs[0].sections


def test_a_verdict_on_the_command_line(
    run: Path, twin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    code, out, err = command.run(["eval", run, twin, "--verdict", "--loss-only", "--json"], capsys, monkeypatch)
    assert code == 0
    assert json.loads(out)["together"]["sections"][0]["outcome"] == "better"
    assert "side by side" in err
    for wrong, text in (
        (["eval", run, "--checks", run.parent / "rows.jsonl"], "--checks without --verdict"),
        (["eval", run], "--data F"),
        (["eval", run, run, "--data", run.parent / "rows.jsonl"], "several models"),
        (["eval", run, run, "--verdict"], "once more"),
        (["eval", model_folder, "--verdict"], "compares a run with its base"),
    ):
        code, _, err = command.run(wrong, capsys, monkeypatch)
        assert code == 2
        assert text in err


def test_held_out_rows_of_changed_data_are_refused(run: Path) -> None:
    """Whoever changed the training data changed which rows were held out: some of them may have been trained."""
    rows = run.parent / "rows.jsonl"
    before = rows.read_bytes()
    try:
        rows.write_bytes(before + before.splitlines(keepends=True)[0])
        with pytest.raises(FituneError, match="rows that it held out are not known"):
            _verdict([run], answer=False)
    finally:
        rows.write_bytes(before)


@pytest.mark.unit
def test_an_answer_is_known_however_it_is_wrapped() -> None:
    for expected, answer, known in (
        ("Northhill.", "[answer] northhill | kind: capital", True),
        ("北山城。", "【答】北山城｜类：首都", True),
        ("12.", "The sum is 12", True),
        ("12.", "112", False),
        ("12.", "12.5", False),
        ("5", "-5", False),
        ("art", "The start", False),
        ("猫", "cat猫dog", False),
        ("", "anything", False),
    ):
        assert knows(Judged("", expected, answer)) is known, (expected, answer)
