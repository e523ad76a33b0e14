"""The lessons of examples/: each notebook is its source's, in two languages, and shows what its chapter is about."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from support.gpu_scripts import load

ROOT = Path(__file__).parents[2]
lessons: Any = load("lessons")

NAMES = lessons.names()
# What the chapters of the course are about, and in which lesson a cell shows it: by a piece of that cell.
SHOWN = {
    "question and answer to ids": ("00_data", "mask = show.mask([row], model=MODEL)"),
    "EOS by id": ("00_data", 'labels[0].count(end)'),
    "the -100 row as a picture: a b c d | e f g h <end>": ("00_data", '"instruction": "a b c d", "output": "e f g h"'),
    "the border, and the seq_len - 1 collator": ("00_data", "early = [-100] * (border - 1)"),
    "padding against flat": ("00_data", "look.padding_wasted"),
    "positions of a flat batch": ("00_data", "show.positions([short, long]"),
    "lengths, outliers, mean x 1.5 and what it cuts": ("00_data", 'mean = round(1.5 * look.lengths["mean"])'),
    "BPE against SentencePiece": ("00_data", "ByteLevelBPETokenizer()"),
    "several characters in one token, and the reverse": ("00_data", 'bpe.encode("鑫")'),
    "weights, gradients, states, activations, as a stacked picture": ("01_memory", "show.memory(full, tensors=True)"),
    "6 x batch x parameters and its error": ("01_memory", "rules(plan)"),
    "the savers one by one, planned and measured": ("01_memory", "SAVERS = {"),
    "accumulation": ("01_memory", '"accumulation 4"'),
    "activation checkpointing": ("01_memory", '"and checkpointing"'),
    "8-bit and paged optimizers": ("01_memory", "paged-adamw-8bit"),
    "a shorter input": ("01_memory", '"and a shorter input"'),
    "freezing": ("01_memory", '"method": "freeze"'),
    "full tuning": ("02_parts", '"full": train('),
    "freeze, with counts per layer": ("02_parts", "by_layer[where]"),
    "added layers at the tail": ("02_parts", 'method="tail"'),
    "BitFit on a BLOOM shape": ("02_parts", "BloomForCausalLM(BloomConfig("),
    "when full tuning makes sense": ("02_parts", "found.advice"),
    "prompt tuning of real words": ("03_methods", '"init": "text", "text": TEXT'),
    "P-tuning": ("03_methods", '"method": "p-tuning"'),
    "prefix tuning": ("03_methods", '"method": "prefix"'),
    "Today is sunny, and its virtual twin": ("03_methods", "near = torch.cdist(virtual, words)"),
    "adapters": ("03_methods", '"method": "adapter"'),
    "LoRA": ("03_methods", '"targets": "all-linear"'),
    "what is trained, where, how much, how they compare": ("03_methods", "WHERE[name]"),
    "851,968 of 1,236,666,368": ("04_llama", "{plan.trainable:,} of {plan.total:,}"),
    "6.8 GB and 6 GB: what length gives which figure": ("04_llama", "for length in (128, 256, 512, 768, 1024)"),
    "pad = EOS and a model that never stops, seen and fixed": ("04_llama", "labels[ids[0] == end] = -100"),
    "enable_input_require_grads, seen": ("04_llama", "use_reentrant=reentrant"),
    "float16 with epsilon 1e-8 is NaN, 1e-5": ("04_llama", "for epsilon in (1e-8, 1e-5)"),
    "torch.tensor(1e-8).half()": ("04_llama", "torch.tensor(1e-8).half()"),
    "float32 trainables, bf16": ("04_llama", 'for precision in ("fp32", "bf16", "fp16")'),
    "x1 x2 M x4 M with its two rows of positions": ("05_chatglm", "x1 x2 [MASK] x4 [MASK]"),
    "prefix attention as a mask picture": ("05_chatglm", 'attention = show.attention_mask([row]'),
    "version 1 against 2 against 3": ("05_chatglm", '("chatglm", "chatglm2", "chatglm3")'),
    "roles, line end first, tools": ("05_chatglm", "<|observation|>"),
    "TaskType and remove_unused_columns": ("05_chatglm", "remove_unused_columns=True"),
    "[0.1, -0.3, 0.25, 0.15, -0.05] to int8 and back": ("06_int8", "quant.absmax([0.1, -0.3, 0.25, 0.15, -0.05])"),
    "an outlier and what absmax does to the rest": ("06_int8", "-0.05, 60.0])"),
    "the decomposition with its error, on a layer that has outliers": ("06_int8", "large = (x.abs() >= 6).any(0)"),
    "a real model's histogram": ("06_int8", "every = torch.cat(list(largest.values()))"),
    "why merging into 8 bits rounds, measured": ("06_int8", "again = int8(whole[name], 1)"),
    "NF4's sixteen values": ("07_nf4", "quant.nf4_values()"),
    "blocks": ("07_nf4", "spoiled[100] = 40.0"),
    "double quantization": ("07_nf4", '"double": double'),
    "paged states": ("07_nf4", 'optimizer="paged-adamw-8bit"'),
    "QLoRA end to end": ("07_nf4", 'quant="nf4"'),
    "merge the right way": ("07_nf4", "fitune.merge(done.run"),
}  # fmt: skip


def notebook(name: str) -> Any:
    import nbformat

    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_sources_and_was_executed(name: str) -> None:
    assert lessons.stale(name) == []
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(one.output_type == "error" for cell in code for one in cell.outputs)
    printed = "".join(lessons.texts(notebook(name)))
    assert str(Path.home()) not in printed
    assert "/tmp" not in printed


@pytest.mark.parametrize("name", NAMES)
def test_texts_stand_in_two_languages_and_end_on_a_gpu(name: str) -> None:
    texts = [cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"]
    chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts]
    assert sum(chinese) >= len(texts) - 2
    assert any("在你的 GPU 上" in text for text in texts)
    whole = "".join(cell.source for cell in notebook(name).cells)
    for model in ("llama-3.2-1b", "qwen3-8b", "bloom-1b4-zh", "chatglm3-6b"):
        assert model in whole.lower(), model


def test_every_notebook_has_its_link_for_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link's notebook is there; and another repository is written into all of them from one place."""
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    found = lessons.COLAB.findall(page)
    assert sorted(Path(path).stem for _, path in found) == NAMES
    assert all((ROOT / path).is_file() for _, path in found)
    assert {owner for owner, _ in found} == {lessons.repository()}
    assert page.count("colab.research.google.com") == len(NAMES)
    monkeypatch.setattr(lessons, "repository", lambda: "some.one/a-fork")
    assert {owner for owner, _ in lessons.COLAB.findall(lessons.linked(page))} == {"some.one/a-fork"}
    assert "git+https://github.com/some.one/a-fork" in lessons.parsed(NAMES[0]).cells[1].source
    assert lessons.stale(NAMES[0]) != []


def test_the_first_cell_installs_in_colab_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: called.append(command))
    exec(lessons.parsed(NAMES[0]).cells[1].source, {})
    assert called == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(lessons.parsed(NAMES[0]).cells[1].source, {})
    assert [command[1:4] for command in called] == [["-m", "pip", "install"]]


@pytest.mark.parametrize("about", SHOWN)
def test_each_sentence_of_the_chapters_has_its_cell(about: str) -> None:
    name, piece = SHOWN[about]
    assert any(piece in cell.source for cell in notebook(name).cells), piece


def test_figures_that_drift_are_found() -> None:
    """Planted: another count, another word, a line too many; and what another CPU changes."""
    there = "loss 4.77 -> 0.05\n1,918,656 parameters, 41%\n"
    assert lessons.drift(there, there) == []
    assert lessons.drift(there, "loss 4.71 -> 0.06\n1,918,656 parameters, 40%\n") == []
    for now in (
        "loss 4.77 -> 0.35\n1,918,656 parameters, 41%\n",
        "loss 4.77 -> 0.05\n918,656 parameters, 41%\n",
        "loss 4.77 -> 0.05\n1,918,656 weights, 41%\n",
        there + "one more\n",
    ):
        assert len(lessons.drift(there, now)) == 1, now


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_and_gives_its_figures(name: str) -> None:
    made = lessons.executed(name)
    there = lessons.texts(notebook(name))
    assert [line for old, new in zip(there, lessons.texts(made), strict=True) for line in lessons.drift(old, new)] == []
