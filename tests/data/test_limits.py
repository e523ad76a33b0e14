"""Untrusted texts have limits: chat templates that never end, files that never end, numbers that nobody means."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jinja2 import TemplateError
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from fitune.core import config, untrusted
from fitune.core.errors import ConfigError, DataError, FituneError, ModelError, Problems, RunawayError
from fitune.core.records import Message
from fitune.data import encodings, tables
from fitune.data.encode import Encoder
from fitune.data.readers import read
from fitune.data.rows import load
from fitune.data.templates import counted as counting
from fitune.data.templates import sandbox
from fitune.data.templates.counted import counted
from fitune.data.templates.jinja import ChatTemplate
from fitune.data.templates.sandbox import Runaway
from fitune.models.configs import read_config_file
from support import chat_templates, tiny

pytestmark = pytest.mark.unit

BASE = _compile_jinja_template("").environment
BIG = "{% set ns = namespace(s='a') %}{% for i in range(20) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"  # a million
TREE = "{% set ns = namespace(s=('a',), t=('b',)) %}{% for i in range(60) %}{% set ns.s = BOTH %}{% endfor %}"
LISTS, DICTS, TUPLES = (TREE.replace("BOTH", x) for x in ("[ns.s, ns.s]", "{'a': ns.s, 'b': ns.s}", "(ns.s, ns.s)"))
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = [
    "{{ 'a' * 3000000000 }}", "{% set n = 3000000000 %}{{ 'a' * n }}", "{{ ([0] * 1000000000) | length }}",
    LOOPS, "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    f"{{% set x %}}{LOOPS}{{% endset %}}", f"{{% block a %}}{LOOPS}{{% endblock %}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    f"{LISTS}{{{{ ns.s }}}}", f"{LISTS}{{{{ ns.s | tojson }}}}", f"{LISTS}{{{{ ns.s | string | length }}}}",
    f"{DICTS}{{{{ '%s' % (ns.s,) }}}}", f"{TUPLES}{{{{ {{ns.s: 1}} }}}}", f"{LISTS}{{{{ [1] == ns.s }}}}",
    "{{ (range(99999) | join('a' * 9999)) | length }}", "{{ ('a' * 9999).join(range(99999) | map('string')) }}",
    "{{ 'a' | center(10 ** 9) }}", "{{ 'a'.ljust(10 ** 9) }}", "{{ ('\t' * 9999).expandtabs(9999999) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (1000000000, 1) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}", BIG + "{{ ('{0}' * 9999).format(ns.s) }}",
    "{% set n = 99 %}{{ n ** 999999999 }}", BIG + "{{ ns.s | replace('a', ns.s) }}", "{{ 'a\nb' | indent(10 ** 9) }}",
    "{{ [1, 2] | tojson(indent=10 ** 9) }}", "{{ [1] | slice(10 ** 9) | list }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ (1).to_bytes(2000000000, 'big') }}", BIG + "{{ ns.s.translate({97: ns.s}) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    BIG + "{% set b = namespace(l=[]) %}{% for i in range(9999) %}{% set b.l = b.l + [ns.s ~ i] %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% if 'b' in ns.s %}{% endif %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set x = ns.s.find('b') %}{% endfor %}",
    BIG + "{% set b = namespace(l=[]) %}{% for i in range(999) %}{% set b.l = b.l + [ns.s.split('a')] %}{% endfor %}",
    "a" * 300_000,
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_template_that_never_ends_is_stopped_by_counting(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 60_000)
    with pytest.raises(Runaway):
        counted(BASE, HUGE[number]).render(messages=MESSAGES)


def test_a_template_is_compiled_once_and_each_of_its_renderers_counts_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %} once"
    first = counted(BASE, text)
    monkeypatch.setattr(counting, "_Code", None)
    with pytest.raises(TypeError):  # what would be compiled now fails
        counted(BASE, f"{text}!")
    second = counted(BASE, text)
    assert second.render(messages=MESSAGES) == "Hi?Hello. once"
    first.environment.left = 0  # type: ignore[attr-defined]  # jinja2's type has no counters
    with pytest.raises(Runaway):
        first.render(messages=MESSAGES)
    assert second.render(messages=MESSAGES) == "Hi?Hello. once"


@pytest.mark.parametrize("text", ["{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "{{ 1 / 0 }}", "{{ a.b.c }}",
                                  "{% include 'x' %}", "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
                                  "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ range(10 ** 12) }}",
                                  "{{ raise_exception('x' * 9999) }}", "{% for %}",
                                  "{{ lipsum(n=9999) }}"])  # fmt: skip
def test_other_failures_of_a_template_are_one_message_with_its_folder(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    named = tiny.make_tokenizer()
    named.name_or_path = "/models/mine"
    with pytest.raises(ConfigError, match="/models/mine") as caught:
        ChatTemplate(text, named, None).prompt([Message("user", "Hi?")])
    assert len(str(caught.value)) < 1_000


def test_the_counting_environment_writes_what_that_of_transformers_does() -> None:
    given: dict[str, Any] = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    given |= {"bos_token": "<s>", "eos_token": "</s>", "strftime_now": lambda form: "26 Jul 2024"}
    for name in ("channels", "gemma3", "glm4.5", "llama3.1", "mistral", "qwen2.5", "qwen3", "r1", "v3.1"):
        text = chat_templates.read(name)
        assert counted(BASE, text).render(**given) == _compile_jinja_template(text).render(**given), name
    odd = (
        "{% for a in [3, 1, 2] | sort | reverse %}{{ loop.index }}{{ loop.last }}{{ a }}{% else %}x{% endfor %}"
        "{% for k, v in {'a': 1}.items() if v %}{{ k ~ v ~ none ~ 1.5 }}{% endfor %}{{ [1, 'a', (2,)] }}{{ 7 % 3 }}"
        "{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{{ 'abc'[1:] }}"
        "{{ a is defined }}"
        "{{ ['b', 'a'] | map('upper') | join('-') }}{{ 'a%s' % 1 }}{{ 'x' in 'xy' }}{{ '{}'.format(2) }}"
        "{{ undefined_ }}"
    )
    assert counted(BASE, odd).render() == _compile_jinja_template(odd).render()
    with pytest.raises(TemplateError):
        counted(BASE, "{{ raise_exception('no') }}").render()


def test_a_template_that_runs_away_on_a_row_is_named_with_the_row_and_asked_no_more(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = tiny.make_tokenizer()
    words.chat_template = tiny.CHAT + "{% if 'bomb' in messages[0]['content'] %}{{ 'a' * 3000000000 }}{% endif %}"
    given = [{"instruction": f"say {n}{' bomb' * (n == 2)}", "output": "b"} for n in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    template = ChatTemplate(words.chat_template, words, "<|end|>")
    encoder = Encoder(words, template)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*does not end") as caught:
        encoder.samples_of(list(load([str(path)]).rows), on_bad=lambda number, error: None)
    assert "3,000,000,000" in str(caught.value)
    with pytest.raises(RunawayError):
        template.prompt([Message("user", "Hi?")])


# ---- YAML, JSON ----

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "when its aliases are expanded"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("lr: 1\nseed: 2\nlr: 3\n", "'lr' is given twice, first in line 1"),
        ("lora: {rank: 1, rank: 2}", "'rank' is given twice"),
        ("[" * 5_000, "nested too deeply"),
        ("a: " + "{a: " * 200, "nested too deeply"),
        ("yes: 1", "no text"),
        ("when: 2001-99-99", "cannot be read"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: \0", "cannot be read as YAML"),
        ("- 1", "a mapping of settings"),
    ],
)
def test_yaml_that_expands_nests_or_repeats_is_refused_with_its_file_and_place(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml") as caught:
        config.read_yaml(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, '{"a":' * 200 + "1" + "}" * 200, "", "\0" * 50, "{", "[1]", "NaN"]
)
def test_json_that_is_none_or_nested_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        untrusted.read_json(path)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices in folders are POSIX")
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, kind in (("pipe.json", "a pipe"), ("zero.json", "a device")):
        with pytest.raises(ModelError, match=f"is {kind}"):
            untrusted.read_json(tmp_path / name)
        with pytest.raises(DataError):
            list(read(tmp_path / name))


# ---- numbers ----


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**8), ("num_hidden_layers", -1), ("max_position_embeddings", 0), ("vocab_size", 10**12),
     ("max_position_embeddings", -1), ("hidden_size", 10**9), ("intermediate_size", 0), ("rms_norm_eps", 1e999),
     ("num_attention_heads", 2.5), ("head_dim", 10**9), ("num_experts", 10**11), ("rope_theta", -1e300)],
)  # fmt: skip
def test_sizes_that_no_model_has_are_named(tmp_path: Path, model_folder: Path, field: str, value: float) -> None:
    values = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(ModelError, match=field):
        read_config_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "setting", ["epochs=1e9", "epochs=.inf",
                "max_steps=1000000000000", "lora.rank=1000000000", "lr=.nan", "lora.targets=[]",

                "batch_size=1000000000000", "max_length=1000000000000", "save_every=1000000000000"],
)  # fmt: skip
def test_settings_that_never_end_are_named(setting: str) -> None:
    with pytest.raises((ConfigError, Problems), match=setting.partition("=")[0]):
        config.build({"model": "m", "data": ["d"], **config.parse_assignments([setting])})


# ---- data ----


def _wide(count: int) -> dict[str, str]:
    return {f"c{n}": "x" for n in range(count)}


def _xlsx(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/worksheets/sheet1.xml", b"<row/>" * (3 << 20))


def _gzip(path: Path) -> None:
    with gzip.open(path, "wb", 1) as out:
        for _ in range(40):
            out.write(b" " * (1 << 20))


def _columns(path: Path) -> None:
    parquet.write_table(pa.table({f"c{n}": ["x"] for n in range(501)}), path)


def _twice(path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["instruction", "output", "output"])
    parquet.write_table(table, path)


def _alike(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int8()), ["x"])
    parquet.write_table(pa.table({"text": column}), path)


def _text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


DEEP = '{"instruction": "a", "output": "b", "x": ' + "[" * 300 + "]" * 300 + "}\n"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "columns.csv": (_text(",".join(_wide(600)) + "\n"), "too many columns"),
    "columns.jsonl": (_text(json.dumps(_wide(600)) + "\n"), "too many columns"),
    "columns.parquet": (_columns, "too many columns"),
    "twice.parquet": (_twice, "two columns of one name"),
    "deep.jsonl": (_text(DEEP), "x: nested too deeply"),
    "bomb.jsonl.gz": (_gzip, "nearly nothing but repetition"),
    "bomb.xlsx": (_xlsx, "nearly nothing but repetition"),
    "rows.parquet": (_alike, "2,000,000 rows"),
}


@pytest.mark.parametrize("name", CASES)
def test_data_without_a_measure_is_refused_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (encodings, tables):
        monkeypatch.setattr(module, "BOMB", 8 << 20)
    monkeypatch.setattr(tables, "MOST_COLUMNS", 500)
    make, says = CASES[name]
    make(tmp_path / name)
    with pytest.raises(FituneError) as caught:
        load([str(tmp_path / name)])
    assert name in str(caught.value)
    assert says in str(caught.value)


def test_a_row_that_is_too_long_is_refused_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "MOST_ROW", 100_000)
    good = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    path = tmp_path / "long.jsonl"
    path.write_text(good + json.dumps({"instruction": "a" * 200_000, "output": "b"}) + "\n" + good)
    with pytest.raises(DataError, match=r"long\.jsonl:2: a row that is too long"):
        list(read(path))
    path.write_text("[" + ",".join([good.strip()] * 9_000) + "]")  # a list in one line is none
    assert len(list(read(path))) == 9_000
