"""`fitune export --to gguf-lora` and `--to ollama`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fitune
from fitune.commands.export_gguf import GgufOptions
from fitune.commands.export_lora import export_lora
from fitune.commands.export_ollama import export_ollama
from fitune.commands.same_answers import Sizes
from fitune.core.errors import ModelError
from fitune.core.records import Conversation, Message
from fitune.data import tokenizer
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from fitune.models.configs import read_config
from fitune.models.handover import ollama
from fitune.models.handover.conversations import CONVERSATIONS, talk
from fitune.models.handover.gguf import llamacpp, lora
from support import tiny

BUNDLED = Path(fitune.__file__).parent / "bundled" / "model"
QUICK = Sizes(prompts=10, tokens=8, strings=300)
needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.installed(), reason="llama-cpp-python (the extra `verify`) is not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose adapter changes the answers."""
    place = tmp_path_factory.mktemp("runs")
    data = tiny.write_rows(place / "rows.jsonl", 16)
    fitune.train(
        model=str(BUNDLED), data=str(data), output=str(place / "run"), epochs=1, learning_rate=1e-2, batch_size=4
    )
    return place / "run"


# ---- the adapter ----


@needs_llama_cpp
def test_the_adapter_alone_answers_as_chat_does(run: Path, tmp_path: Path) -> None:
    done = export_lora(run, tmp_path / "a.gguf", GgufOptions(verify=True, sizes=QUICK))
    assert done.compared is not None
    assert done.compared.text() == "10 of 10 prompts, 80 tokens equal; 300 of 300 strings"


@needs_llama_cpp
@pytest.mark.parametrize("fault", ["rows of q in transformers' order", "half of the scale", "a layer that is missing"])
def test_a_fault_in_the_adapter_is_refused(
    fault: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lora.draft

    def broken(*args: Any) -> Any:
        name, metadata, pieces = real(*args)
        if fault == "half of the scale":
            metadata = {**metadata, "adapter.lora.alpha": metadata["adapter.lora.alpha"] / 2}
        elif fault == "a layer that is missing":
            pieces = [piece for piece in pieces if not piece.name.startswith("blk.2.")]
        return name, metadata, pieces

    if fault.startswith("rows"):
        monkeypatch.setattr(lora, "_change", lambda architecture, name, config, scale, rows: rows)
    monkeypatch.setattr(lora, "draft", broken)
    with pytest.raises(ModelError, match="would not answer as fitune's chat does"):
        export_lora(run, tmp_path / "a.gguf", GgufOptions(verify=True, sizes=QUICK))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"use_dora": True}, "DoRA"), ({"bias": "all"}, "biases"), ({"modules_to_save": ["lm_head"]}, "saved whole"),
     ({"init_lora_weights": "pissa"}, "PiSSA"), ({"peft_type": "IA3"}, "no LoRA adapter")],
)  # fmt: skip
def test_adapters_that_llama_cpp_does_not_take(setting: dict[str, Any], named: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **setting}))
    with pytest.raises(ModelError, match=named):
        lora.draft(folder, "a", read_config(BUNDLED))


def test_scales_of_their_own_are_folded_in(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    values |= {"alpha_pattern": {"v_proj": 4 * values["lora_alpha"]}}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    _, metadata, pieces = lora.draft(folder, "a", read_config(BUNDLED))
    assert metadata["adapter.lora.alpha"] == 0.0
    tensors = {piece.name: torch.cat([part() for part in piece.parts]) for piece in pieces}
    own = load_file(folder / "adapter_model.safetensors")
    scale = values["lora_alpha"] / values["r"]
    stem = "base_model.model.model.layers.0"
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], own[f"{stem}.self_attn.v_proj.lora_B.weight"] * 4 * scale)
    queries = own[f"{stem}.self_attn.q_proj.lora_B.weight"] * scale  # the first row of a head stays where it is
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"][0], queries[0])


# ---- Ollama ----


def as_ollama(template: str, messages: list[Message]) -> str:
    """What Ollama makes of a template: the part of Go's text/template that is written, read here by another way."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    tokens = re.split(r"(\{\{.*?\}\})", template)

    def run_block(place: int, scope: dict[str, Any], live: bool) -> tuple[str, int]:
        made = ""
        while place < len(tokens):
            token = tokens[place]
            place += 1
            if not token.startswith("{{"):
                made += token if live else ""
                continue
            word = token[2:-2].strip()
            if word == "end" or word.startswith("else"):
                return made, place - 1
            if word.startswith("if "):
                done = False
                while True:
                    take = live and not done and ((word.startswith("else") and word == "else") or truth(word, scope))
                    part, place = run_block(place, scope, take)
                    made, done = made + part, done or take
                    word = tokens[place][2:-2].strip()
                    place += 1
                    if word == "end":
                        break
            elif word.startswith("range"):
                start = place
                for n, message in enumerate(messages):
                    part, place = run_block(start, {"message": message, "left": len(messages) - n}, live)
                    made += part
                place += 1
            elif live:
                made += value(word, scope)
        return made, place

    def truth(word: str, scope: dict[str, Any]) -> bool:
        word = word.removeprefix("else ").removeprefix("if ")
        if word == ".System":
            return bool(system)
        if word == "$last":
            return bool(scope["left"] == 1)
        return bool(scope["message"].role == json.loads(word.removeprefix("eq .Role ")))

    def value(word: str, scope: dict[str, Any]) -> str:
        if word.startswith("$last"):
            return ""
        if word.startswith('"'):
            return str(json.loads(word))
        return system if word == ".System" else str(scope["message"].content)

    return run_block(0, {}, True)[0]


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama3", "llama2", "alpaca", "own"])
def test_the_template_in_ollamas_language(name: str) -> None:
    words = tokenizer.load(BUNDLED)
    from fitune.commands.export_ollama import _as_others, _jinja
    from fitune.data.templates import choose

    encoder = Encoder(words, choose("chat_template", words) if name == "own" else TABLE[name])
    jinja = _jinja(encoder)
    made = ollama.frame(lambda one: _as_others(jinja, encoder, one), [])
    tried = 0
    for _, kinds, conversation in CONVERSATIONS:
        later = any(message.role == "system" for message in conversation.messages[1:])
        if kinds & {"tools", "context"} or later or conversation.messages[-1].role != "user":
            continue
        expected = _as_others(jinja, encoder, conversation)
        if expected is not None and (made.system or "system" not in kinds):
            assert as_ollama(made.go(), list(conversation.messages)) == expected
            tried += 1
    assert tried >= 10


def test_a_template_that_does_more_is_refused() -> None:
    def strips(one: Conversation) -> str:
        return "".join(f"<{m.role}>{m.content.strip()}" for m in one.messages) + "<assistant>"

    with pytest.raises(ModelError, match="cannot be written in Ollama's language"):
        ollama.frame(strips, [])
    assert strips(talk("x")) == "<user>x<assistant>"


def test_braces_and_quotes_of_a_template_stand_as_they_are() -> None:
    def odd(one: Conversation) -> str:
        return "".join('{{ """' + m.role + "\n" + m.content + "}}" for m in one.messages) + "="

    made = ollama.frame(odd, [])
    text = ollama.modelfile("a.gguf", made.go(), ["<|end|>", 'say "x"'], {"temperature": 0.0})
    assert text.count('"""') == 2
    asked = talk("a", "b", "c", system="s")
    assert as_ollama(made.go(), list(asked.messages)) == odd(asked)
    assert 'PARAMETER stop "say \\"x\\""' in text


def test_a_folder_for_ollama(run: Path, tmp_path: Path) -> None:
    done = export_ollama(run, tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["Modelfile", "model.gguf"]
    text = (tmp_path / "mine" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|end|>"' in text
    assert done.notes[-1].startswith("ollama create mine -f ")
    with pytest.raises(fitune.FituneError, match="not empty"):
        export_ollama(run, tmp_path / "mine")


def test_the_seal_is_checked_first(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tensors = load_file(copy / "adapter" / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "adapter" / "adapter_model.safetensors")
    with pytest.raises(fitune.FituneError):
        export_lora(copy, tmp_path / "a.gguf")
