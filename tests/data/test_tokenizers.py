"""Tokenizer folders: what loads, what is refused, and ChatGLM's ids against those of the original code."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fitune.core.errors import ConfigError, DataError, ModelError
from fitune.core.records import Conversation, Message, ToolCall
from fitune.data import tokenizer as tokenizers
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE, choose, from_dict
from support.encoding import sample_of

SPECIAL = "<|endoftext|><|im_end|></s><s>[gMASK]<sop><eop>sop<|user|><unk>"
FOLDERS = {
    "llama2": "tokenizers/llama2",
    "qwen2": "tokenizers/qwen2",
    "gpt2": "tokenizers/gpt2",
    "chatglm1": "tokenizers/chatglm1",
    "chatglm2": "tokenizers/chatglm2",
    "stories260K": "models/stories260K",
}
EOS = {
    "llama2": ("</s>", 2),
    "qwen2": ("<|im_end|>", 151645),
    "gpt2": ("<|endoftext|>", 50256),
    "chatglm1": ("<eop>", 130005),
    "chatglm2": ("</s>", 2),
    "stories260K": ("</s>", 2),
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


@cache
def real(shared: Path, name: str) -> Any:
    """Loaded once: a test that sets something on it loads its own."""
    return tokenizers.load(shared / FOLDERS[name])


def golden(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "golden" / name / "tokens.json").read_text(encoding="utf-8"))


def dialogue(history: list[list[str]], query: str) -> list[Message]:
    turns = [turn for asked, answer in history for turn in (Message("user", asked), Message("assistant", answer))]
    return [*turns, Message("user", query)]


# ---- every real tokenizer ----


@pytest.mark.shared
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_tokenizer_files_loads_and_knows_its_eos(shared: Path, name: str) -> None:
    loaded = real(shared, name)
    assert (loaded.eos_token, loaded.eos_token_id) == EOS[name]
    assert tokenizers.encode(loaded, "", literal=True) == []


@pytest.mark.shared
@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_in_a_users_text_stay_text(shared: Path, name: str) -> None:
    loaded = real(shared, name)
    ids = tokenizers.encode(loaded, f"a {SPECIAL} b", literal=False)
    allowed = {loaded.unk_token_id}  # what a vocabulary of 512 cannot write
    assert not (set(ids) & set(loaded.all_special_ids)) - allowed
    if name != "stories260K":
        assert SPECIAL in loaded.decode(ids)
    assert loaded.encode("x", add_special_tokens=False)  # and the call leaves no mark on the tokenizer


MANY = [
    "a",
    "  two  spaces\n\n\ttab ",
    "你好, world! " * 40,
    f"typed {SPECIAL} here",
    "é́ 🦙🦙 def f(x):\n    return x",
    "</s>",
    " ",
]


@pytest.mark.shared
@pytest.mark.parametrize("name", FOLDERS)
def test_many_texts_have_the_ids_of_each_alone(shared: Path, name: str) -> None:
    loaded = real(shared, name)
    for first in ("left", "typed </s>"):  # a call of the other kind before it leaves its settings in the tokenizer
        tokenizers.encode(loaded, first, literal=first == "left")
        assert tokenizers.encode_many(loaded, MANY) == [tokenizers.encode(loaded, t, literal=False) for t in MANY]


def test_a_tokenizer_that_adds_to_what_its_backend_gives_is_asked_itself(tokenizer: Any) -> None:
    class Shifted:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text: list[str] | str, **settings: bool) -> dict[str, Any]:
            ids = tokenizer(text, **settings)["input_ids"]
            return {"input_ids": [*ids, 7] if isinstance(text, str) else [[*one, 7] for one in ids]}

    assert all(ids[-1] == 7 for ids in tokenizers.encode_many(Shifted(), ["one", "two words"]))  # type: ignore[arg-type]  # a fake of what encoding asks for


@pytest.mark.shared
@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_tokenizer_gives_the_same_ids(shared: Path, name: str, tmp_path: Path) -> None:
    loaded = real(shared, name)
    loaded.save_pretrained(tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".model", ".txt", ".jinja")]
    again = tokenizers.load(tmp_path)
    for text in ("def f(x):\n    return x\n", "今天能否打篮球", f"a\tb  {SPECIAL}"):
        for literal in (True, False):
            expected = tokenizers.encode(loaded, text, literal=literal)
            assert tokenizers.encode(again, text, literal=literal) == expected
    assert again.eos_token_id == loaded.eos_token_id


@pytest.mark.shared
def test_merges_with_windows_line_ends_load(shared: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers/qwen2" / name, tmp_path)
    shutil.copy(shared / "tokenizers/qwen2/merges.crlf.orig.txt", tmp_path / "merges.txt")
    assert b"\r\n" in (tmp_path / "merges.txt").read_bytes()[:100]
    text = "Hello world, 今天能否打篮球\n\n    return"
    expected = tokenizers.encode(real(shared, "qwen2"), text, literal=True)
    assert tokenizers.encode(tokenizers.load(tmp_path), text, literal=True) == expected


@pytest.mark.shared
def test_a_bare_sentencepiece_file_loads(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "tokenizers/llama2/tokenizer.model", tmp_path / "spm.model")
    loaded = tokenizers.load(tmp_path)
    assert loaded.eos_token_id == 2
    assert tokenizers.encode(loaded, "hello world", literal=True) == [22172, 3186]


def test_a_tokenizer_json_needs_no_code_of_the_folder(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    loaded = tokenizers.load(tmp_path)
    assert loaded("two plus three")["input_ids"] == tokenizer("two plus three")["input_ids"]


# ---- what is refused ----


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        tokenizers.load(folder)
    assert caught.value.received
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


def test_odd_folders_are_refused_with_one_clear_error(tmp_path: Path) -> None:
    assert "no such folder" in str(refused(tmp_path / "none"))
    assert "an empty folder" in str(refused(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert "no tokenizer files" in str(refused(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken", encoding="utf-8")
    assert "cannot be read" in str(refused(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[1]", encoding="utf-8")
    assert "not a JSON object" in str(refused(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{broken", encoding="utf-8")
    assert "not JSON" in str(refused(tmp_path))


def test_a_git_lfs_pointer_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', encoding="utf-8")
    assert "Git LFS" in str(refused(tmp_path))


def test_remote_code_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    settings = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["evil.OddTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert "never runs" in str(refused(tmp_path))
    assert "[y/N]" not in capfd.readouterr().out


# ---- ChatGLM: ids of the original code ----

GLM = {"chatglm-6b": "chatglm1", "chatglm2-6b": "chatglm2", "chatglm3-6b": "chatglm2"}


@pytest.mark.shared
@pytest.mark.parametrize("version", GLM)
def test_chatglm_texts(shared: Path, version: str) -> None:
    loaded = real(shared, GLM[version])
    for row in golden(shared, version)["texts"]:
        for literal in (True, False):
            assert tokenizers.encode(loaded, row["text"], literal=literal) == row["ids"]


@pytest.mark.shared
def test_chatglm_1_prompts_and_pairs(shared: Path) -> None:
    loaded, known = real(shared, "chatglm1"), golden(shared, "chatglm-6b")
    encoder = Encoder(loaded, choose("auto", loaded))
    for row in known["prompt_with_special_tokens"]:
        assert loaded(row["text"])["input_ids"] == row["ids"]
        assert encoder.prompt([Message("user", row["text"])]) == row["ids"]
    for row in known["pair"]:
        assert loaded(row["query"], row["answer"])["input_ids"] == row["ids"]
        sample = sample_of(encoder, Conversation((Message("user", row["query"]), Message("assistant", row["answer"]))))
        assert sample.ids.tolist() == row["ids"]
        assert sample.prompt_length == row["ids"].index(130004) + 1
        assert sample.mask.tolist() == [n >= sample.prompt_length for n in range(len(sample))]
    row = known["multi_turn_prompt"]
    assert encoder.prompt(dialogue(row["history"], row["query"])) == row["ids"]
    special = known["special"]
    assert loaded.bos_token_id == special["bos_token_id"]
    assert loaded.pad_token_id == special["pad_token_id"]
    assert loaded.mask_token_id == special["mask_token_id"]
    assert loaded.unk_token_id == special["unk_token_id"]
    assert loaded.convert_tokens_to_ids("[gMASK]") == special["gmask_token_id"]
    assert loaded.convert_tokens_to_ids("</s>") == special["end_token_id"]


@pytest.mark.shared
def test_chatglm_2_prompts(shared: Path) -> None:
    loaded, known = real(shared, "chatglm2"), golden(shared, "chatglm2-6b")
    encoder = Encoder(loaded, choose("auto", loaded))
    for row in known["single"]:
        assert encoder.prompt([Message("user", row["query"])]) == row["ids"]
    row = known["multi_turn"]
    assert encoder.prompt(dialogue(row["history"], row["query"])) == row["ids"]
    special = known["special"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    assert tokenizers.single_id(loaded, "[gMASK]") == special["gMASK"]
    assert tokenizers.single_id(loaded, "sop") == special["sop"]


@pytest.mark.shared
def test_chatglm_3_prompts_and_tools(shared: Path) -> None:
    loaded, known = real(shared, "chatglm2"), golden(shared, "chatglm3-6b")
    encoder = Encoder(loaded, TABLE["chatglm3"])
    for row in known["single"]:
        assert encoder.prompt([Message("user", row["query"])]) == row["ids"]
    row = known["multi_turn"]
    turns = [Message(m["role"], m["content"]) for m in row["history"]]
    assert encoder.prompt([*turns, Message("user", row["query"])]) == row["ids"]

    row = known["tools"]
    system, question, _ = row["history"]
    call = Message("assistant", "", tool_calls=(ToolCall("get_weather", '{"city": "北京"}'),))
    turns = [Message("system", system["content"]), Message("user", question["content"]), call]
    turns.append(Message("tool", row["query"]))
    assert encoder.prompt(turns, system["tools"]) == row["ids"]
    assert encoder.prompt(turns, [{"type": "function", "function": system["tools"][0]}]) == row["ids"]

    sample = sample_of(encoder, Conversation((*turns, Message("assistant", "晴")), tools=tuple(system["tools"])))
    assert sample.ids[: len(row["ids"])].tolist() == row["ids"]
    trained = [i for i, m in zip(sample.ids.tolist(), sample.mask.tolist(), strict=True) if m]
    observation, newline = known["special"]["<|observation|>"], [30910, 13]
    assert trained == [
        *tokenizers.encode(loaded, "get_weather\n", literal=True),
        *tokenizers.encode(loaded, "```python\ntool_call(city='北京')\n```", literal=False),
        observation,
        *newline,
        *tokenizers.encode(loaded, "晴", literal=False),
        2,
    ]
    assert set(encoder.stop_ids) == {2, 64795, 64797}
    for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>"):
        assert tokenizers.single_id(loaded, name) == known["special"][name]


@pytest.mark.shared
@pytest.mark.parametrize("version", ["chatglm1", "chatglm2"])
def test_chatglm_decodes_what_it_encodes(shared: Path, version: str) -> None:
    loaded = real(shared, version)
    for text in ("a\tb\n\nc", "def f(x):\n    return x\n", "𠮷野家 emoji 😀", "x" + " " * 90 + "y"):
        assert loaded.decode(tokenizers.encode(loaded, text, literal=False)) == text
    stop = int(loaded.eos_token_id)
    assert loaded.decode([*loaded("你好", add_special_tokens=False)["input_ids"], stop]) == f"你好{loaded.eos_token}"
    assert loaded.decode([stop, stop], skip_special_tokens=True) == ""
    assert loaded.decode([len(loaded) + 1]) == ""  # rows of the padded vocabulary


@pytest.mark.shared
@pytest.mark.parametrize("version", ["chatglm1", "chatglm2"])
def test_chatglm_pads_on_either_side(shared: Path, version: str) -> None:
    loaded = tokenizers.load(shared / FOLDERS[version])
    alone = loaded("好")["input_ids"]
    for side in ("left", "right"):
        loaded.padding_side = side
        batch = loaded(["好", "今天能否打篮球"], padding=True)
        pads = [loaded.pad_token_id] * (len(batch["input_ids"][1]) - len(alone))
        assert batch["input_ids"][0] == ([*pads, *alone] if side == "left" else [*alone, *pads])
        assert sum(batch["attention_mask"][0]) == len(alone)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("config", "settings", "name", "family"),
    [
        ({"_name_or_path": "THUDM/chatglm3-6b"}, {}, "model", "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, {}, "model", "chatglm2"),
        ({}, {"name_or_path": "THUDM/chatglm3-6b-32k"}, "model", "chatglm3"),
        ({}, {}, "my-chatglm3-6b", "chatglm3"),
        ({}, {"added_tokens_decoder": {"64796": {"content": "<|assistant|>"}}}, "model", "chatglm3"),
        ({}, {}, "model", "chatglm2"),
    ],
)
def test_chatglm_2_and_3_are_distinguished(
    shared: Path, tmp_path: Path, config: dict, settings: dict, name: str, family: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(shared / "tokenizers/chatglm2/tokenizer.model", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", **config}), encoding="utf-8")
    settings = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = tokenizers.load(folder)
    assert choose("auto", loaded).name == family
    assert choose("chatglm3", loaded).name == "chatglm3"  # a name that is given always wins
    loaded.save_pretrained(tmp_path / "saved")
    assert choose("auto", tokenizers.load(tmp_path / "saved")).name == family


@pytest.mark.shared
def test_the_old_chatglm_vocabulary_is_refused(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "tokenizers/chatglm1/ice_text.model", tmp_path)
    settings = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 20000}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "image tokens" in str(refused(tmp_path))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_chatglm_1_and_2_make_one_sample_per_answer(shared: Path, name: str) -> None:
    loaded = real(shared, {"chatglm": "chatglm1", "chatglm2": "chatglm2"}[name])
    encoder = Encoder(loaded, TABLE[name])
    turns = (*dialogue([["你好", "你好！"], ["天气", "晴"]], "谢谢"), Message("assistant", "不客气"))
    samples = encoder.samples(Conversation(turns))
    assert [s.ids[: s.prompt_length].tolist() for s in samples] == [encoder.prompt(turns[:n]) for n in (1, 3, 5)]
    for sample, turn in zip(samples, (1, 3, 5), strict=True):
        assert sample.mask[sample.prompt_length :].all()
        answer = tokenizers.encode(loaded, turns[turn].content, literal=False)
        assert sample.ids[sample.mask].tolist() == [*answer, encoder.stop_id]
    assert (
        Encoder(loaded, TABLE[name], train_on="last").samples(Conversation(turns))[0].ids.tolist()
        == samples[-1].ids.tolist()
    )
    with pytest.raises(DataError, match="no place for tools"):
        encoder.samples(Conversation(turns, tools=(TOOL,)))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_a_long_chatglm_prompt_is_cut_in_the_users_text_only(shared: Path, name: str) -> None:
    loaded = real(shared, {"chatglm": "chatglm1", "chatglm2": "chatglm2"}[name])
    question = "春眠不觉晓，处处闻啼鸟。" * 20
    row = Conversation((Message("system", "简短"), Message("user", question), Message("assistant", "好")))
    for limit in (40, 60, 90):
        sample = Encoder(loaded, TABLE[name], limit).samples(row)[0]
        assert limit - 3 <= len(sample) <= limit
        assert sample.ends_whole
        assert sample.cut_prompt > 0
        assert sample.cut_answer == 0
        prompt = loaded.decode(sample.ids[: sample.prompt_length], skip_special_tokens=True)
        assert name == "chatglm" or prompt.endswith("\n\n答：")


# ---- every real tokenizer with every template ----


@pytest.mark.shared
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("template", TABLE)
def test_prompt_and_row_agree_for_every_tokenizer_and_template(shared: Path, name: str, template: str) -> None:
    loaded = real(shared, name)
    fits = {"chatglm": ["chatglm1"], "chatglm2": ["chatglm2"], "chatglm3": ["chatglm2"]}
    encoder = (
        Encoder(loaded, from_dict(TABLE[template].as_dict(), loaded)) if name in fits.get(template, FOLDERS) else None
    )
    turns = (
        Message("user", f"hi {SPECIAL} there"),
        Message("assistant", "hello"),
        Message("user", "你好"),
        Message("assistant", "very good"),
    )
    if encoder is None:
        with pytest.raises(ConfigError, match="lacks"):
            sample_of(Encoder(loaded, TABLE[template]), Conversation(turns))
        return
    sample, prompt = sample_of(encoder, Conversation(turns)), encoder.prompt(turns[:-1])
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert sample.mask[len(prompt) :].all()
    assert not sample.mask[len(prompt) - 1]
    assert sample.ids[-1] in encoder.stop_ids


@pytest.mark.shared
def test_no_space_is_added_between_the_parts_of_a_llama_prompt(shared: Path) -> None:
    loaded = real(shared, "llama2")
    turns = (Message("user", "hi"), Message("assistant", "hello you"))
    sample = sample_of(Encoder(loaded, TABLE["alpaca"]), Conversation(turns))
    assert "### Instruction:\nhi\n\n### Response:\nhello you</s>" in loaded.decode(sample.ids)
    chat = sample_of(Encoder(loaded, TABLE["llama2"]), Conversation(turns))
    whole = loaded("[INST] hi [/INST] hello you ")["input_ids"]  # as Meta's code encodes it: all in one
    assert chat.ids.tolist() == [*whole, 2]


# ---- parity with the sentencepiece file ----


@pytest.mark.shared
def test_parity_finds_repeated_spaces(shared: Path) -> None:
    folder = shared / "tokenizers/llama2"
    loaded = tokenizers.load(folder)
    found = tokenizers.parity(folder, loaded, ["hello", "x    return", "你好"])
    assert [d.text for d in found] == ["x    return"]
    assert found[0].received != found[0].expected
    assert tokenizers.parity(shared / "tokenizers/gpt2", real(shared, "gpt2"), ["x    return"]) == []
    assert tokenizers.parity(shared / "tokenizers/chatglm2", real(shared, "chatglm2"), ["x    return"]) == []
