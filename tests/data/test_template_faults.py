"""What templates refuse, forget or write by themselves: rows are named, texts move, dates stay, faults are found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fitune
from fitune.checks import datachecks, labelchecks
from fitune.core.config import build
from fitune.core.errors import ConfigError, DataError, FituneError, Problems
from fitune.core.records import Conversation, Message, Segment, Source, ToolCall
from fitune.data import pipeline
from fitune.data.encode import Encoder
from fitune.data.templates import PieceTemplate, choose, from_dict
from fitune.data.templates.jinja import ChatTemplate, of_tokenizer
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from support import chat_templates as kinds
from support import tiny
from support.encoding import decoded, sample_of
from support.prepared import prepared
from support.template_rows import KINDS, ROWS, TOOL

HI, HELLO = Message("user", "Hi?"), Message("assistant", "Hello.")
SYSTEM = Message("system", "Be brief.")
CALL = Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Rome"}'),))


def encoder_for(jinja: object, **how: Any) -> Encoder:
    tokenizer = kinds.make_tokenizer(jinja, "<|im_end|>")
    return Encoder(tokenizer, of_tokenizer(tokenizer, **how))


def folder_with(jinja: str, path: Path) -> Path:
    folder = tiny.save("llama", path)
    tokenizer = kinds.make_tokenizer(jinja)
    tokenizer.save_pretrained(str(folder))
    return folder


def write(path: Path, rows: list[list[Message]]) -> Path:
    lines = [{"messages": [{"role": m.role, "content": m.content} for m in row]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_template_that_stands_twice_in_its_file_is_named_by_it(tmp_path: Path) -> None:
    """Rows would be called wrong, one after the other, and none is."""
    folder = folder_with(kinds.QWEN25, tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", [[HI, HELLO]])
    assert read(folder, data).samples
    file = folder / "chat_template.jinja"
    text = file.read_text()
    file.write_text(text * 2)
    with pytest.raises(ConfigError, match="writes every message twice") as caught:
        read(folder, data)
    assert str(file) in str(caught.value)
    file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text * 2}))
    with pytest.raises(ConfigError, match=r"twice \(that of .*tokenizer_config\.json\)"):
        read(folder, data)


# ---- rows that a template refuses ----


def read(folder: Path, data: Path, **settings: Any) -> pipeline.Data:
    from fitune.data import tokenizer

    config = build({"model": str(folder), "data": [str(data)], "val_share": 0.0, **settings})
    return datachecks.read(config, folder, tokenizer.load(folder), limit=512, vocabulary=500)


def test_rows_that_the_template_refuses_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    folder = folder_with(kinds.GEMMA2, tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", [[HI, HELLO], [HI, HI, HELLO], [HI, HELLO], [HELLO, HI, HELLO]])
    with pytest.raises(DataError) as caught:
        read(folder, data)
    text = str(caught.value)
    assert f"{data}:2: the tokenizer's own chat template refuses a conversation (and 1 more row)" in text
    assert "Conversation roles must alternate" in text
    assert "--skip-bad" in text
    found = read(folder, data, skip_bad=True)
    assert (found.report.rows, found.report.kept, found.report.skipped_bad) == (2, 2, 2)
    assert found.report.skipped[0].startswith(f"{data}:2: ")
    assert found.report.bad_reasons == {"the tokenizer's own chat template refuses a conversation": 2}
    again = read(folder, data, skip_bad=True)  # from the cache
    assert again.report.skipped == found.report.skipped
    with pytest.raises(DataError, match=r"refuses a conversation \(and 1 more row\)"):
        read(folder, write(tmp_path / "bad.jsonl", [[HI, HI, HELLO], [HELLO, HI, HELLO]]), skip_bad=True)


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 + 'a' }}", "{{ nobody.knows }}", "{{ messages[99].role }}", "{{ raise_exception('no') }}", "{% for %}"],
)
def test_whatever_fails_in_a_template_is_an_error_of_the_row(fault: str) -> None:
    with pytest.raises(FituneError) as caught:
        encoder_for(kinds.QWEN25 + fault, options={}).samples(Conversation((HI, HELLO), Source("f.jsonl", 3)))
    assert "f.jsonl:3" in str(caught.value)


@pytest.mark.parametrize("left_out", ["system", "user", "tool"])
def test_a_turn_that_a_template_leaves_out_is_named(left_out: str) -> None:
    jinja = (
        "{% for m in messages %}{% if m.role != '" + left_out + "' or m.content == 'fituneruled' or m.content == "
        "'fitunegave' %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Conversation((SYSTEM, HI, CALL, Message("tool", "10:05"), HELLO), Source("f.jsonl", 1))
    with pytest.raises(DataError, match=f"leaves out turn .*of the role {left_out}"):
        encoder_for(jinja).samples(row)


# ---- templates as they come ----


@pytest.mark.parametrize("listed", [False, True])
def test_several_templates_by_name(listed: bool, tmp_path: Path) -> None:
    named = {"default": kinds.GEMMA3, "tool_use": kinds.QWEN25, "rag": "{{ documents }}"}
    tokenizer = kinds.make_tokenizer(named)
    if listed:  # as published files have them
        tokenizer.save_pretrained(str(tmp_path))
        for file in [*tmp_path.glob("*.jinja"), *tmp_path.glob("additional_chat_templates/*")]:
            file.unlink()
        path = tmp_path / "tokenizer_config.json"
        several = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": several}))
        tokenizer = fitune.data.tokenizer.load(tmp_path)
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    decode = tokenizer.decode
    assert decode(encoder.prompt([HI])) == "<s><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n"
    tool = {"type": "function", "function": {"name": "clock", "description": "t", "parameters": {"type": "object"}}}
    with_tools = Conversation((HI, CALL, Message("tool", "10:05"), HELLO), tools=(tool,))
    (sample,) = encoder.samples(with_tools)
    assert decode(sample.ids).startswith("<|im_start|>system\nYou are Qwen.\n\n# Tools")
    again = from_dict(json.loads(json.dumps(encoder.template.as_dict())), tokenizer)
    assert Encoder(tokenizer, again).samples(with_tools)[0].ids.tolist() == sample.ids.tolist()
    with pytest.raises(ConfigError, match="none is called default"):
        ChatTemplate({"tool_use": kinds.QWEN25}, tokenizer, None)


def test_arguments_come_as_the_template_wants_them() -> None:
    as_text = encoder_for(kinds.R1)
    spelled = replace(CALL, tool_calls=(ToolCall("clock", '{"city":"Rome"}'),))  # letter by letter
    sample = as_text.samples(Conversation((HI, spelled)))[0]
    assert '\n```json\n{"city":"Rome"}\n```' in decoded(as_text, sample.ids[sample.mask])
    as_python = kinds.QWEN25.replace("tool_call.arguments | tojson", "tool_call.arguments")
    sample = encoder_for(as_python).samples(Conversation((HI, CALL)))[0]
    assert '"arguments": {"city": "Rome"}}' in decoded(as_text, sample.ids[sample.mask])  # not {'city': ...}


# ---- texts of a system ----


def test_a_system_text_moves_where_the_template_has_no_place_for_it() -> None:
    row = Conversation((SYSTEM, HI, HELLO), Source("f.jsonl", 1))
    moved = encoder_for(kinds.GEMMA2)
    (sample,) = moved.samples(row)
    decode = partial(decoded, moved)
    assert decode(sample.ids) == (
        "<s><start_of_turn>user\nBe brief.\n\nHi?<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>"
    )
    again = Encoder(moved.tokenizer, from_dict(moved.template.as_dict(), moved.tokenizer))
    assert again.prompt(row.messages[:-1]) == sample.ids[: sample.prompt_length].tolist()
    with pytest.raises(DataError, match=r"f.jsonl:1: .*refuses a conversation"):
        encoder_for(kinds.GEMMA2, system_role="keep").samples(row)
    for jinja in (kinds.QWEN25, kinds.GEMMA2):
        asked = encoder_for(jinja, system_role="first-user")
        assert "user\nBe brief.\n\nHi?" in decode(asked.samples(row)[0].ids)
    assert "system\nBe brief.<|im_end|>" in decode(encoder_for(kinds.QWEN25).samples(row)[0].ids)


def test_moved_texts_and_dates_are_reported(tmp_path: Path) -> None:
    folder = folder_with(kinds.GEMMA2, tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", [[SYSTEM, HI, HELLO]] * 3)
    (finding,) = [f for f in read(folder, data).findings if f.rule == "chat-template"]
    assert finding.level == "fixed"
    assert "system texts stand in the first user's turn (the chat template has no place for them)" in finding.text
    (finding,) = [f for f in read(folder, data, system_role="first-user").findings if f.rule == "chat-template"]
    assert "(as asked)" in finding.text
    with pytest.raises(ConfigError, match="for the tokenizer's own chat template"):
        read(folder, data, template="chatml", template_options={"enable_thinking": False})


# ---- the date ----


def test_a_run_keeps_the_date_that_its_template_writes(tmp_path: Path) -> None:
    folder = folder_with(kinds.LLAMA31, tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", [[HI, HELLO]] * 6)
    settings: dict[str, Any] = {
        "model": str(folder), "data": [str(data)], "max_steps": 2, "sample_prompts": 0, "device": "cpu",
        "precision": "fp32", "output": str(tmp_path / "run"), "save_every": 1,
    }  # fmt: skip
    fitune.train(**settings)
    path = tmp_path / "run" / "template.json"
    stored = json.loads(path.read_text())
    assert stored["date"]
    tuned = fitune.load(tmp_path / "run")
    path.write_text(json.dumps({**stored, "date": "2024-02-03"}))  # trained on another day
    integrity.reseal(RunFolder(tmp_path / "run"))
    tuned = fitune.load(tmp_path / "run")
    assert "Today Date: 03 Feb 2024" in tuned.tokenizer.decode(tuned.encoder.prompt([HI]))
    resumed = read(folder, data, output=str(tmp_path / "run"))
    assert "Today Date: 03 Feb 2024" in tuned.tokenizer.decode(resumed.samples[0].ids)
    (finding,) = [f for f in resumed.findings if f.rule == "chat-template"]
    assert finding.text == "the chat template writes a date: 2024-02-03, kept by the run"
    fitune.merge(tmp_path / "run", tmp_path / "merged")
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    text = plain.apply_chat_template([{"role": "user", "content": "Hi?"}], tokenize=False, add_generation_prompt=True)
    assert "Today Date: 03 Feb 2024" in text
    assert plain(text, add_special_tokens=False)["input_ids"] == tuned.encoder.prompt([HI])


def test_options_go_with_the_template() -> None:
    encoder = encoder_for(kinds.QWEN3, options={"enable_thinking": False})
    stored = json.loads(json.dumps(encoder.template.as_dict()))
    assert stored["options"] == {"enable_thinking": False}
    again = Encoder(encoder.tokenizer, from_dict(stored, encoder.tokenizer))
    assert decoded(encoder, again.prompt([HI])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert isinstance(again.template, ChatTemplate)
    rendered = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], chat_template=again.template.for_others(), add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert rendered == again.prompt([HI])


@pytest.mark.parametrize("name", ["auto", "chat_template"])
def test_options_that_the_template_never_reads_are_refused(name: str) -> None:
    tokenizer = encoder_for(kinds.QWEN3, options={}).tokenizer
    assert choose(name, tokenizer, options={"enable_thinking": False}).name == "chat_template"
    with pytest.raises(Problems) as caught:
        choose(name, tokenizer, options={"enable_thinkin": False, "tools": 1})
    text = str(caught.value)
    assert "template_options: the chat template never reads 'enable_thinkin'" in text
    assert "did you mean 'enable_thinking'?" in text
    assert "never reads 'tools'" in text  # set by the rows
    silent = encoder_for(kinds.GEMMA2, options={}).tokenizer
    with pytest.raises(ConfigError, match="never reads 'enable_thinking'"):
        choose(name, silent, options={"enable_thinking": False})


# ---- thoughts ----


def test_a_thought_without_a_place_is_refused_by_name(tokenizer: Any) -> None:
    row = Conversation((HI, replace(HELLO, thought="A greeting.")), Source("f.jsonl", 7))
    for name in ("auto", "alpaca", "chatml"):  # a vocabulary without tags
        with pytest.raises(DataError, match=r"f.jsonl:7: .*place for a thought"):
            Encoder(tokenizer, choose(name, tokenizer)).samples(row)
    tagged = kinds.make_tokenizer(kinds.QWEN25, "<|im_end|>")
    encoder = Encoder(tagged, choose("chatml", tagged))
    (sample,) = encoder.samples(row)
    assert tagged.decode(sample.ids[sample.mask]) == "<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"


# ---- planted faults: label-border finds headers that are trained ----


class _TrainsHeaders(PieceTemplate):
    def _segments(self, messages: Any, tools: Any) -> list[Segment]:
        return [replace(s, trained=s.trained or s.text == self.opening) for s in super()._segments(messages, tools)]


class _TrainsTheFirstHeader(ChatTemplate):
    """As it was: what stands before a greeting was taken for a part of it, in the row and in its prompt alike."""

    def prompt(self, messages: Any, tools: Any = ()) -> list[Segment]:
        return [] if not messages else super().prompt(messages, tools)

    def render(self, messages: Any, tools: Any = ()) -> list[Segment]:
        found = super().render(messages, tools)
        first = messages[0].role == "assistant"
        return [replace(s, trained=True) if first and s.turn == 0 else s for s in found]


GREETING = Conversation((HELLO, HI, HELLO), Source("f.jsonl", 1), "messages")
TWO = Conversation((HI, HELLO, HELLO), Source("f.jsonl", 1), "messages")


def test_a_trained_header_is_found() -> None:
    tokenizer = kinds.make_tokenizer(kinds.QWEN25, "<|im_end|>")
    template = _TrainsHeaders("planted", user="Q: {content}\n", opening="A: ", after_stop="\n")
    p = prepared(tokenizer, rows=(TWO,))
    assert labelchecks.label_border(p).level == "ok"
    p = replace(p, encoder=Encoder(tokenizer, template))
    rows = [replace(row, source=Source("f.jsonl", 1)) for row in p.conversations]
    samples = [sample_of(p.encoder, row) for row in rows]
    found = labelchecks.label_border(replace(p, conversations=rows, samples=samples))
    assert found.level == "refuse"
    assert "the first label is token" in found.text


def test_a_greeting_that_trains_the_default_system_text_is_found() -> None:
    tokenizer = kinds.make_tokenizer(kinds.QWEN25, "<|im_end|>")
    assert labelchecks.label_border(prepared(tokenizer, rows=(GREETING,), max_length=256)).level == "ok"
    p = prepared(tokenizer, rows=(GREETING,), max_length=256)
    wrong = Encoder(tokenizer, _TrainsTheFirstHeader(kinds.QWEN25, tokenizer, "<|im_end|>"), 256)
    samples = [sample_of(wrong, row) for row in p.conversations]
    found = labelchecks.label_border(replace(p, encoder=wrong, samples=samples))
    assert found.level == "refuse"
    assert "labels in turn 1, where its answer has" in found.text


def test_rows_with_wrong_labels_are_named_and_can_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(kinds.QWEN25, tmp_path / "model")
    data = write(
        tmp_path / "rows.jsonl", [[HI, HELLO]] * 120 + [[HELLO, HI, HELLO]] + [[HI, HELLO], [HELLO, HI, HELLO]]
    )
    clean = read(folder, data, cache="none", skip_bad=True)
    assert (clean.report.kept, clean.report.skipped_bad) == (123, 0)
    own = ChatTemplate.prompt, ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "prompt", lambda self, m, tools=(): own[0](self, m, tools) if m else [])

    def render(self: Any, m: Any, tools: Any = ()) -> list[Segment]:
        first = m[0].role == "assistant"
        return [replace(s, trained=True) if first and s.turn == 0 else s for s in own[1](self, m, tools)]

    monkeypatch.setattr(ChatTemplate, "render", render)
    (found,) = [one for one in read(folder, data, cache="none").findings if one.rule == "label-border"]
    assert found.level == "refuse"
    assert re.search(
        r"rows.jsonl:12[13]: \d+ labels in turn 1, .*: '.*system.*Hello.*', not 'Hello.*'; expected", found.text
    )
    assert "--skip-bad" in str(found.fix)
    skipped = read(folder, data, cache="none", skip_bad=True)
    assert (skipped.report.rows, skipped.report.kept, skipped.report.skipped_bad) == (121, 121, 2)
    assert [text.split(": ")[0] for text in skipped.report.skipped] == [f"{data}:121", f"{data}:123"]
    assert {one.rule: one.level for one in skipped.findings}["label-border"] == "ok"
    with pytest.raises(DataError, match="labels are not the answer's own"):
        read(folder, write(tmp_path / "bad.jsonl", [[HELLO, HI, HELLO]] * 2), cache="none", skip_bad=True)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.options])
def test_checks_find_nothing_wrong_with_any_kind(name: str) -> None:
    kind = KINDS[name]
    tools = () if name == "r1" else (TOOL,)
    rows = [
        Conversation(row, format="messages", tools=tools if case.startswith("call") else ())
        for case, row in ROWS.items()
        if case not in kind.refused
    ]
    p = prepared(kinds.make_tokenizer(kind.jinja, kind.eos), rows=rows, max_length=2000)
    for rule in (
        labelchecks.label_border,
        labelchecks.template_parity,
        labelchecks.eos_supervised,
        labelchecks.double_bos,
    ):
        assert rule(p).level == "ok", rule(p)


def test_samples_that_repeat_prompts_say_what_it_costs() -> None:
    tokenizer = kinds.make_tokenizer(kinds.QWEN3, "<|im_end|>")
    talk = Conversation((HI, HELLO, HI, HELLO), format="messages")
    p = prepared(tokenizer, rows=(talk,), max_length=256)
    whole = [len(s) for s in p.encoder.samples(talk)]
    assert p.report.samples == 40
    assert p.report.repeated == 20 * whole[0]
    share = whole[0] / whole[1]
    assert f"{20 * whole[0]:,} tokens of prompts repeated ({share:.0%} more)" in datachecks.rows(p).text
    once = prepared(kinds.make_tokenizer(kinds.QWEN25, "<|im_end|>"), rows=(talk,), max_length=256)
    assert (once.report.samples, once.report.repeated) == (20, 0)
    assert "repeated" not in datachecks.rows(once).text


def test_problems_of_several_kinds_are_reported_together(tmp_path: Path) -> None:
    folder = folder_with(kinds.GEMMA2, tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [asked, asked, answered]}, {"messages": [asked, call]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Problems) as caught:
        read(folder, data)
    assert f"{data}:1: " in str(caught.value)
    assert f'{data}:2: template "the tokenizer\'s own" has no place for tool calls' in str(caught.value)
