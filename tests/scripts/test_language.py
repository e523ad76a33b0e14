"""Plain language: help texts, messages and documents keep to the glossary (ARCHITECTURE.md says what each word means).

A word that the glossary rules out stands in RULED_OUT with what is said in its place. Where such a word is right, the
place stands in ALLOWED. The list grows: add a word once no text has it any more.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fitune.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "fitune").rglob("*.py"))
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("README*.md")), ROOT / "ARCHITECTURE.md"]
PAGES = sorted((ROOT / "src" / "fitune" / "views" / "pages").iterdir())
PAGES = [path for path in PAGES if path.suffix in (".jinja", ".js")]
PAGES += sorted((ROOT / "src" / "fitune" / "commands" / "ui" / "page").glob("*.[hj]*"))
RULED_OUT = {  # a pattern, and what is said in its place
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bsaid aloud\b": "printed, or reported",
    r"\bwhat is well\b": "passed checks",
    r"\btokenizers to put beside\b": "tokenizers to compare",
    r"\b(tells?|told|untold)\b": "report, print, show or give",
    r"\bin words\b|\b(own|maker's) words\b": "as text",
    r"\bold rules\b": "rules of thumb",
    r"max_tokens|max-tokens": "max_new_tokens, --max-new-tokens",
    r"\bway of tuning\b|\bways of tuning\b": "method",
    r"底座|原模型|底模|基座(?!模型)": "基座模型",
    r"不是有限值": "出现 NaN/Inf 时",
    r"扁平批次": "平铺批次",
    r"训练文件夹": "训练目录",
    r"不用检查点|有无检查点|重计算检查点": "激活检查点",
}
IN_HELP = {  # further words that no help text has
    r"\bwords?\b": "token, tokenizer, or text",
    r"\bthings?\b": "what it is",
    r"(?<!learning )\brate\b": "learning rate",
    r"^(How|Which|What)\.": "a sentence that says what the option sets",
}
IN_NAMES = {  # what no variable, function or parameter of the package is called
    r"^_?(un)?told$|^_?tell$": "what it holds: reason, lengths, header",
    r"^_?words$": "what it holds: arguments, embedding, text",
    r"^_?say$": "message, report or write_line",
    r"^without_words$": "without_prompt_text",
}
# and nothing in the tests, scripts and benchmarks
BESIDE = {r"(^|_)(un)?(told|said)(_|$)|^_?tell$": "what it holds: message, text, finding, predicted"}
TOOLS = [path for name in ("tests", "scripts", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]
ALLOWED = {  # (file's or verb's name, the pattern): a word that is right there
    ("help", r"\bwords?\b"),
    ("conversations", r"\b(tells?|told|untold)\b"),  # "Tell me a joke, please."
    ("names", r"max_tokens|max-tokens"),  # what others call it
    *((file, r"max_tokens|max-tokens") for file in ("asked", "app", "serve", "serve.zh-CN")),  # OpenAI's field
    ("as_jinja", r"^_?say$"),  # a template writes what somebody says
    ("chat", r"^_?say$"),  # chat.say("hello") is what the user says
    ("readers", r"^_?words$"),  # words of file names
}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a module."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the string literals of a module, docstrings among them."""
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of what a module binds: variables, functions, parameters, attributes."""
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def broken(name: str, text: str, rules: dict[str, str] = RULED_OUT) -> list[str]:
    """What is to be said otherwise in a text."""
    return [
        f"{name}: {found[0]!r} in {text[max(0, found.start() - 40) : found.end() + 40]!r}: say {instead}"
        for pattern, instead in rules.items()
        for found in re.finditer(pattern, text, re.IGNORECASE)
        if (Path(name).stem, pattern) not in ALLOWED
    ]


def helps(verb: str) -> dict[str, str]:
    """Each option of a verb with its help text."""
    arguments = cli.app[verb].assemble_argument_collection()
    return {f"{verb} {one.name}": str(one.parameter.help or "") for one in arguments if one.name != "*"}


VERBS = [verb for verb in cli.app if not verb.startswith("-")]


def test_messages_and_docstrings_keep_to_the_glossary() -> None:
    faults = [
        fault for path in SOURCES for line, text in strings(path) for fault in broken(f"{path.name}:{line}", text)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("paths", "rules"), [(SOURCES, IN_NAMES), (TOOLS, BESIDE)], ids=["package", "beside"])
def test_names_keep_to_the_glossary(paths: list[Path], rules: dict[str, str]) -> None:
    faults = [
        fault for path in paths for line, name in names(path) for fault in broken(f"{path.name}:{line}", name, rules)
    ]
    assert not faults, "\n".join(faults)


def test_a_planted_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("told = 1\ndef f(words):\n    self.say = lambda tell: words\n", encoding="utf-8")
    assert {name for _, name in names(tmp_path / "a.py") if broken("a", name, IN_NAMES)} == {
        "told",
        "words",
        "say",
        "tell",
    }
    assert broken("a", "test_a_mistake_is_told", BESIDE)
    assert not broken("a", "untoldest", BESIDE)


@pytest.mark.parametrize("path", [*DOCUMENTS, *PAGES], ids=lambda path: path.name)
def test_documents_and_pages_keep_to_the_glossary(path: Path) -> None:
    faults = broken(path.name, path.read_text(encoding="utf-8"))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_sets(verb: str) -> None:
    found = helps(verb)
    assert all(text.strip() for name, text in found.items()), [name for name, text in found.items() if not text.strip()]
    faults = [fault for name, text in found.items() for fault in broken(name, text, {**RULED_OUT, **IN_HELP})]
    assert not faults, "\n".join(faults)


def test_a_planted_word_is_found() -> None:
    assert broken("a", "a user can mend it") == ["a: 'mend' in 'a user can mend it': say fix"]
    assert broken("a", "与原模型并排")
    assert broken("a", "the old rules say")
    assert broken("a", "as PyTorch tells it")
    assert broken("a", "bytes in words")
    assert broken("a", "基座的损失")
    assert not broken("a", "基座模型的损失")
    assert not broken("a", "recommended, 激活检查点, 检查点 of a run")
    assert broken("train --x", "Words to put beside.", IN_HELP)
    assert broken("train --x", "How.", IN_HELP)
    assert not broken("train --x", "Peak learning rate.", IN_HELP)
