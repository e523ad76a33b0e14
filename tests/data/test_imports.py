"""What the two lowest rooms may load: no torch, no PEFT, nothing that draws on a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fitune.data import tokenizer as tokenizers
from support import tiny

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "peft", "bitsandbytes", "accelerate", "rich")
SCRIPT = """
import importlib, json, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(json.dumps([name for name in sys.argv[1].split(",") if name in sys.modules]))
"""


def loaded(*modules: str) -> list[str]:
    """Which of HEAVY a new process has loaded once it has imported these modules."""
    found = run(SCRIPT, ",".join(HEAVY), *modules)
    return [str(name) for name in json.loads(found)]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(room: str) -> list[str]:
    files = sorted((SOURCE / "fitune" / room).rglob("*.py"))
    return [".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for file in files]


def test_no_module_of_core_and_data_loads_torch_peft_or_rich() -> None:
    modules = [*modules_of("core"), *modules_of("data")]
    assert len(modules) > 40
    assert loaded(*modules) == []


def test_the_count_finds_what_is_loaded() -> None:
    assert loaded("fitune.data.rows", "fitune.views.terminal") == ["rich"]  # the cheapest of them


INSPECT = """
import sys
from pathlib import Path
from fitune.commands.inspect import inspect, page
from fitune.core.config import build
found = inspect(build({"model": sys.argv[1], "data": [sys.argv[2]], "cache": "none"}))
page(found)
print(found.rows["read"], *(name for name in ("torch", "peft") if name in sys.modules))
"""


def test_a_look_at_data_with_a_tokenizer_folder_loads_no_torch(tmp_path: Path) -> None:
    tiny.make_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is the capital?", "completion": "Nordhaven."}\n' * 3, encoding="utf-8")
    assert run(INSPECT, str(tmp_path / "tokenizer"), str(rows)).split() == ["3"]


# ---- the class that a folder without a model names is the one that AutoTokenizer takes ----


def same_as_auto(folder: Path) -> None:
    ours = tokenizers.load(folder)
    auto = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    assert type(ours) is type(auto)
    for text in ("What is  the capital?", " \n北国 <|end|></s><s>", "１２ ½"):
        assert ours(text)["input_ids"] == auto(text)["input_ids"]
    assert ours.decode([1, 5, 9, 20]) == auto.decode([1, 5, 9, 20])
    kept = [{k: str(v) for k, v in one.init_kwargs.items() if not k.startswith("_")} for one in (ours, auto)]
    kept[0].pop("legacy", None), kept[1].pop("legacy", None)  # kept for run folders by `load` itself
    assert kept[0] == kept[1]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2", "llama2"])
def test_real_folders_are_read_as_auto_reads_them(shared: Path, name: str) -> None:
    same_as_auto(shared / "tokenizers" / name)


@pytest.mark.parametrize(
    "name",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2TokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast",
     "BloomTokenizerFast", "NoSuchTokenizer", "PreTrainedTokenizer"],
)  # fmt: skip
def test_every_way_to_name_a_class_gives_the_tokenizer_that_auto_gives(name: str, tmp_path: Path) -> None:
    tiny.make_tokenizer().save_pretrained(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": name}))
    same_as_auto(tmp_path)
