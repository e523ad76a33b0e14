"""Published tokenizers in a GGUF, and a published model: tokens and answers of llama.cpp are those of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fitune.commands.export_gguf import GgufOptions, drafted, export_gguf
from fitune.commands.same_answers import Compared, Sizes, compare
from fitune.data import tokenizer
from fitune.engine.loading import load
from fitune.models.handover.gguf import llamacpp
from support import tiny

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not llamacpp.installed(), reason="llama-cpp-python (the extra `verify`) is not installed"),
]


def compared(name: str, shared: Path, tmp_path: Path, count: int) -> Compared:
    """A random model with a published tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(shared / "tokenizers" / name, folder)
    words = tokenizer.load(folder)
    kind = "glm" if name == "chatglm2" else "llama"
    settings = {"head_dim": 8} if kind == "glm" else {}
    tiny.make_model(kind, vocabulary=len(words) + 3, **settings).save_pretrained(str(folder))
    plan = drafted(folder, name)
    plan.write(tmp_path / "a.gguf", "f32")
    tuned = load(folder, device="cpu", precision="fp32")
    return compare(tmp_path / "a.gguf", plan, tuned, Sizes(prompts=10, tokens=4, strings=count))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama2", "chatglm2"])
def test_published_tokenizers(name: str, shared: Path, tmp_path: Path) -> None:
    found = compared(name, shared, tmp_path, 10_000)
    assert found.problems == []
    assert found.text() == "10 of 10 prompts, 40 tokens equal; 10,000 of 10,000 strings"


def test_a_published_model(shared: Path, tmp_path: Path) -> None:
    done = export_gguf(
        shared / "models" / "stories260K", tmp_path / "a.gguf", GgufOptions(verify=True, sizes=Sizes(20, 64, 2000))
    )
    assert done.compared is not None
    assert done.compared.text() == "20 of 20 prompts, 1,280 tokens equal; 2,000 of 2,000 strings"
