"""What leaves a run answers elsewhere as it did here: chat template, stop tokens, card; and bases that were moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import fitune
from fitune.cli import main as cli
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.records import Message
from fitune.data import tokenizer
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE, choose, from_dict, user
from fitune.data.templates.as_jinja import Frame, as_jinja, quoted
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from fitune.models.handover import hand_over, proof, write_stops
from fitune.models.handover.proof import PIECES
from support import tiny

BUNDLED = Path(fitune.__file__).parent / "bundled" / "model"
CHATML = [*tiny.SPECIAL, "<|im_start|>", "<|im_end|>"]
YAML = """
user: "Q: {content}\\n"
user_with_context: "Q: {content} ({context})\\n"
opening: "A:"
assistant: " {content}"
"""


def ids_elsewhere(folder: Path, messages: list[dict[str, Any]], **how: Any) -> list[int]:
    """As plain transformers makes them."""
    plain = AutoTokenizer.from_pretrained(folder)
    return list(plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **how))


# ---- the template as Jinja ----


@pytest.mark.parametrize("name", ["chatml", "qwen", "alpaca", "alpaca-zh", "llama2", "llama3", "plain", "bloom"])
def test_the_templates_of_the_table_are_written_and_have_the_ids_of_training(name: str, tmp_path: Path) -> None:
    words = tokenizer.load(BUNDLED)
    done = hand_over(tmp_path, words, TABLE[name])
    assert done.written
    assert not done.proof.differing
    assert len(done.proof.same) >= 12
    # "Assistant: " and the answer would be one text elsewhere, so bloom takes single questions alone
    assert done.proof.without == (["turns"] if name == "bloom" else [])
    encoder = Encoder(words, TABLE[name])
    for text in ("Name three rivers!", "再见。", "x\n\ny"):
        expected = encoder.prompt([Message("user", text)])
        assert ids_elsewhere(tmp_path, [{"role": "user", "content": text}]) == expected


def test_a_users_own_template_and_the_tokenizers_own(tmp_path: Path) -> None:
    words = tokenizer.load(BUNDLED)
    (tmp_path / "mine.yaml").write_text(YAML, encoding="utf-8")
    done = hand_over(tmp_path / "a", words, user.load(tmp_path / "mine.yaml"))
    assert done.written
    assert "a context" in done.proof.same
    own = hand_over(tmp_path / "b", words, choose("chat_template", words))
    assert own.written
    assert not own.proof.differing
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == words.chat_template
    assert words.chat_template is not None  # the run's tokenizer is left as it was


def test_tools_and_results_are_written(tmp_path: Path) -> None:
    done = hand_over(tmp_path, tiny.make_tokenizer(CHATML), TABLE["chatml"])
    assert {"tools", "a tool's result"} <= set(done.proof.same)
    written = (tmp_path / "chat_template.jinja").read_text()
    assert "{%- for tool in tools or [] %}" in written


def test_bos_stands_once(tmp_path: Path) -> None:
    words = tiny.make_tokenizer(["<pad>", "<|end|>", "<s>"])
    words.bos_token = "<s>"
    words._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert words("a")["input_ids"][0] == 2
    done = hand_over(tmp_path, words, TABLE["alpaca"])
    assert done.written
    ids = ids_elsewhere(tmp_path, [{"role": "user", "content": "hello"}])
    assert ids.count(2) == 1
    assert ids == Encoder(words, TABLE["alpaca"]).prompt([Message("user", "hello")])


def merging_tokenizer() -> Any:
    """Of which two line breaks, and a full stop with them, are one token, as in many published vocabularies."""
    from tokenizers import AddedToken

    words = tiny.make_tokenizer()
    words.add_tokens([AddedToken(".\n\n", special=False), AddedToken("?\n\n", special=False)])
    return words


def test_what_cannot_be_one_text_is_not_written_and_says_so(tmp_path: Path) -> None:
    """The prompt's pieces are written instead, with a mark between them, to be encoded apart."""
    words = merging_tokenizer()
    done = hand_over(tmp_path, words, TABLE["alpaca"])
    assert not done.written
    assert "other ids than in training" in done.reason
    assert not (tmp_path / "chat_template.jinja").exists()  # the base's own would be another template
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    assert done.pieces
    plain = AutoTokenizer.from_pretrained(tmp_path)
    jinja = (tmp_path / PIECES).read_text(encoding="utf-8")
    text = plain.apply_chat_template(
        [{"role": "user", "content": "Why?"}], chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    ids = [i for piece in text.split("\ue000") for i in plain(piece, add_special_tokens=False)["input_ids"]]
    assert ids == Encoder(words, TABLE["alpaca"]).prompt([Message("user", "Why?")])


def test_a_wrong_text_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a Jinja text that forgets a line break."""
    monkeypatch.setattr(proof, "as_jinja", lambda t, frame: as_jinja(t, frame).replace("user\\n", "user "))
    done = hand_over(tmp_path, tokenizer.load(BUNDLED), TABLE["chatml"])
    assert not done.written
    assert not done.pieces
    assert not list(tmp_path.glob("*.jinja"))


def test_a_chat_template_refuses_what_it_would_get_wrong(tmp_path: Path) -> None:
    done = hand_over(tmp_path, tokenizer.load(BUNDLED), TABLE["bloom"])
    assert done.pieces
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(Exception, match="earlier answers"):
        ids_elsewhere(tmp_path, turns)


def test_chatglm_ids_are_no_text(shared: Path, tmp_path: Path) -> None:
    done = hand_over(tmp_path, tokenizer.load(shared / "tokenizers" / "chatglm2"), TABLE["chatglm2"])
    assert (done.written, done.pieces) == (False, False)
    assert "no text" in done.reason


test_chatglm_ids_are_no_text = pytest.mark.shared(test_chatglm_ids_are_no_text)


@pytest.mark.shared
@pytest.mark.parametrize(("name", "template", "without"), [
    ("qwen2", "chatml", []), ("llama2", "llama2", ["empty"]), ("llama2", "alpaca", ["turns"]),
    ("qwen2", "alpaca", None), ("gpt2", "alpaca", None),
])  # fmt: skip
def test_real_tokenizers(shared: Path, tmp_path: Path, name: str, template: str, without: list[str] | None) -> None:
    done = hand_over(tmp_path, tokenizer.load(shared / "tokenizers" / name), TABLE[template])
    assert done.written == (without is not None)
    assert not done.written or done.proof.without == without
    assert done.written or done.pieces


def test_texts_are_quoted() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = "a'b\"c\\n\n\t\\ {{ x }} {% y %} 你 🙂"
    found, _ = render_jinja_template([[{"role": "user", "content": "-"}]], chat_template=Frame(quoted(text)).say(text))
    assert found == [text]


# ---- the stop tokens ----


def test_stops_are_put_before_those_of_the_base(tmp_path: Path) -> None:
    """In place: published files hold settings that transformers refuses to save again."""
    published = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [5, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(published))
    assert write_stops(tmp_path, [2, 9], 9) == [9, 2, 5, 7]
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {**published, "eos_token_id": [9, 2, 5, 7]}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"eos_token_id": 3}')
    assert write_stops(tmp_path / "bare", [4], 4) == [4, 3]


@pytest.fixture(scope="module")
def chatml_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose EOS is another token, tuned on two rows with chatml until it knows them."""
    folder = tmp_path_factory.mktemp("chatml")
    tiny.make_model("llama").save_pretrained(folder / "base")
    words = tiny.make_tokenizer(CHATML)
    words.chat_template = tiny.CHAT
    words.save_pretrained(folder / "base")
    rows = [("Hello?", "the capital of Norland is Mira"), ("你好", "北国的首都是米拉")]
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fitune.train(
        model=folder / "base", data=folder / "rows.jsonl", output=str(folder / "run"), template="chatml",
        method="full", lr=1e-2, max_steps=40, batch_size=2, val_share=0.0, sample_prompts=0,
    )  # fmt: skip
    return folder / "run"


ELSEWHERE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
answers = []
for text in ("Hello?", "你好"):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answers.append(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]))
print(json.dumps(answers))
assert not any(name.split(".")[0] in ("fitune", "peft") for name in sys.modules)
"""


def test_a_merged_model_ends_right_after_the_answer_in_plain_transformers(chatml_run: Path, tmp_path: Path) -> None:
    done = fitune.merge(chatml_run, tmp_path / "merged")
    assert done.handed is not None
    assert done.handed.stops[:2] == ["<|im_end|>", "<|end|>"]
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"][0] == tiny.make_tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
    code = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "merged")]
    found = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-800:]
    assert json.loads(found.stdout.splitlines()[-1]) == [
        "the capital of Norland is Mira<|im_end|>",
        "北国的首都是米拉<|im_end|>",
    ]
    quantized = fitune.quantize(tmp_path / "merged", tmp_path / "nf4")
    for name in ("generation_config.json", "chat_template.jinja", "README.md"):
        assert (Path(quantized.folder) / name).read_text() == (tmp_path / "merged" / name).read_text()


def test_the_result_of_a_full_run_is_a_model_folder(chatml_run: Path, tmp_path: Path) -> None:
    folder = chatml_run / "adapter"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    stop = tiny.make_tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id[0] == stop
    ids = torch.tensor([ids_elsewhere(folder, [{"role": "user", "content": "Hello?"}])])
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60)[0, ids.shape[1] :]
    assert answer[-1] == stop
    assert tiny.make_tokenizer(CHATML).decode(answer[:-1]) == "the capital of Norland is Mira"
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert fitune.generate(folder, "Hello?") == fitune.generate(chatml_run, "Hello?")


def test_an_adapter_brings_tokenizer_template_and_card(model_folder: Path, tmp_path: Path, data_file: Path) -> None:
    fitune.train(model=model_folder, data=data_file, output=str(tmp_path / "run"), template="alpaca", max_steps=1)
    folder = tmp_path / "run" / "adapter"
    ids = ids_elsewhere(folder, [{"role": "user", "content": "Hello?"}])
    words = tokenizer.load(model_folder)
    assert ids == Encoder(words, TABLE["alpaca"]).prompt([Message("user", "Hello?")])
    card = (folder / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "Model ID" not in card  # PEFT's own says nothing
    assert not (folder / "model.safetensors.index.json").exists()


def test_models_merged_before_get_it_when_they_are_quantized(chatml_run: Path, tmp_path: Path) -> None:
    fitune.merge(chatml_run, tmp_path / "merged")
    (tmp_path / "merged" / "chat_template.jinja").unlink()
    (tmp_path / "merged" / "generation_config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "merged" / "README.md").write_text("mine")
    fitune.quantize(tmp_path / "merged", tmp_path / "nf4")
    found = json.loads((tmp_path / "nf4" / "generation_config.json").read_text())
    assert found["eos_token_id"][1] == 1
    assert (tmp_path / "nf4" / "chat_template.jinja").is_file()
    assert (tmp_path / "nf4" / "README.md").read_text() == "mine"


def test_the_card_says_what_a_reader_needs(chatml_run: Path, tmp_path: Path) -> None:
    fitune.merge(chatml_run, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    for text in (
        "license: unknown", "library_name: transformers", "# merged", "`base`", "| rows.jsonl | 2 |", "method `full`",
        "| template | \"chatml\" |", "<|im_end|>", "apply_chat_template", "training loss, last step", "of 24 convers",
    ):  # fmt: skip
        assert text in card, text
    assert str(chatml_run.parent) not in card  # where files lay is nobody's concern
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "merged")))
    compile(code, "card", "exec")


# ---- a base that was moved ----


@pytest.fixture
def moved(model_folder: Path, tmp_path: Path, data_file: Path) -> tuple[Path, Path]:
    """A run that was stopped, and the folder that its base was moved to."""
    shutil.copytree(model_folder, tmp_path / "base")
    settings: dict[str, Any] = {"output": str(tmp_path / "run"), "max_steps": 4, "save_every": 2, "sample_prompts": 0}
    fitune.train(model=tmp_path / "base", data=data_file, **settings)
    for name in ("result.json",):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "base").rename(tmp_path / "new")
    return tmp_path / "run", tmp_path / "new"


def test_a_moved_base_is_named_and_given(moved: tuple[Path, Path], data_file: Path) -> None:
    run, new = moved
    for use in (lambda **how: fitune.load(run, **how), lambda **how: fitune.merge(run, run.parent / "m", **how)):
        with pytest.raises(RunFolderError, match="no such folder") as caught:
            use()
        assert "--model NEW" in str(caught.value)
        use(model=new)
    with pytest.raises(RunFolderError, match="no such folder"):
        fitune.train(resume=True, output=str(run))
    assert fitune.evaluate(run, [str(data_file)], model=new, answer=False).rows == tiny.DATA_ROWS
    assert fitune.generate(run, "hi", model=new, max_new_tokens=2) == fitune.generate(
        fitune.load(run, model=new), "hi", max_new_tokens=2
    )
    done = fitune.train(resume=True, output=str(run), model=new)
    assert done.steps == 4
    fitune.load(run)  # the run's config names the new place


def test_another_model_is_refused_with_both_digests(
    moved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same names and shapes: only the values differ."""
    run, new = moved
    tensors = load_file(new / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFolderError, match="not the base model of the run") as caught:
        fitune.load(run, model=new)
    assert str(caught.value).count("model.safetensors SHA-256") == 2
    monkeypatch.setattr(sys, "argv", ["fitune", "train", "--resume", "--output", str(run), "--model", str(new)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "not the base model of the run" in capsys.readouterr().err


def test_a_model_folder_has_no_base_elsewhere(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        fitune.load(model_folder, model=model_folder)


def test_runs_of_before_have_no_digest_of_values(moved: tuple[Path, Path]) -> None:
    run, new = moved
    data = json.loads((run / "data.json").read_text())
    del data["inputs"][integrity.TENSORS]
    integrity.replace(RunFolder(run), "data.json", json.dumps(data))
    assert isinstance(fitune.load(run, model=new).device, torch.device)


THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' -%}"
    "{%- if loop.last -%}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@pytest.mark.parametrize("jinja", [
    THINKING, THINKING.replace("assistant\\n' }}{%- endif -%}", "assistant\\n<think>\\n' }}{%- endif -%}"),
    "{{ strftime_now('%d %b %Y') }}" + tiny.CHAT,
    {"default": tiny.CHAT, "tool_use": "{{ tools | tojson }}" + tiny.CHAT},
], ids=["last turn thinks", "thought opened", "date", "two templates"])  # fmt: skip
def test_chat_templates_of_today_are_kept_and_proved(jinja: Any, tmp_path: Path) -> None:
    words = tiny.make_tokenizer([*CHATML, "<think>", "</think>"])
    words.chat_template = jinja
    template = choose("chat_template", words)
    if isinstance(jinja, str) and "strftime_now" in jinja:  # a run of long ago
        template = from_dict({**template.as_dict(), "date": "2024-07-26"}, words)
    done = hand_over(tmp_path, words, template)
    assert done.written
    assert not done.proof.differing
    assert len(done.proof.same) >= 12
    plain = AutoTokenizer.from_pretrained(tmp_path)
    if "strftime_now" in jinja:
        text = plain.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
        assert text.startswith("26 Jul 2024")  # what the model was tuned on, whatever day it is
    else:
        assert plain.chat_template == jinja
