"""ChatGLM 1, 2 and 3: equal to the published code, in training, generation, masks and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fitune
from fitune.commands.export import Exported, export
from fitune.core.errors import ModelError, RunFolderError
from fitune.core.records import Message
from fitune.models.configs import read_config
from fitune.models.families import original
from fitune.models.families.chatglm_model import positions_of
from fitune.models.load import load_model
from support import tiny

ROOT = Path(__file__).parents[2]

VERSIONS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, shared: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny model in a published layout, and what the published code gave for it."""
    folder = shared / "golden" / request.param
    return folder, load_file(folder / "expected.safetensors")


def inputs(expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: expected[name] for name in ("input_ids", "attention_mask", "position_ids") if name in expected}


@pytest.mark.shared
def test_logits_ids_loss_and_gradients_are_those_of_the_published_code(golden: Any) -> None:
    folder, expected = golden
    model = fitune.load_model(folder, precision="fp32")
    given = inputs(expected)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    with torch.no_grad():
        logits = model(**given).logits
    assert (logits - expected["logits"])[real].abs().max() <= 1e-4
    made = model.generate(expected["prompt_ids"], max_new_tokens=12, do_sample=False)
    assert torch.equal(made, expected["greedy_ids"])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = model(**given, labels=expected["labels"]).loss
    assert abs(float(loss) - float(expected["loss"])) <= 1e-5
    loss.backward()
    assert (model.get_input_embeddings().weight.grad - expected["grad_embed"]).abs().max() <= 1e-5
    first = model.base_model.layers[0]
    if folder.name == "chatglm-6b":
        fused = first.attention.query_key_value.weight.grad
    else:
        fused = torch.cat([getattr(first.self_attn, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")])
    assert (fused - expected["grad_qkv0"]).abs().max() <= 1e-5


@pytest.mark.shared
def test_positions_and_masks_of_the_first_version(shared: Path) -> None:
    folder = shared / "golden" / "chatglm-6b"
    expected = load_file(folder / "expected.safetensors")
    model: Any = load_model(folder)
    inner = model.transformer
    assert torch.equal(inner.positions(expected["input_ids"]), expected["position_ids"])
    assert torch.equal(inner.positions(expected["span_input_ids"]), expected["span_position_ids"])
    blocked = expected["attention_mask_True_is_blocked"]
    assert torch.equal(~inner._allowed(expected["position_ids"], None, 0), blocked)
    with torch.no_grad():  # as the published code is called, and by ids alone
        given = {"position_ids": expected["position_ids"], "attention_mask": blocked}
        assert (model(expected["input_ids"], **given).logits - expected["logits"]).abs().max() <= 1e-4
        assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() <= 1e-4
        assert (model(expected["span_input_ids"]).logits - expected["span_logits"]).abs().max() <= 1e-4


def test_positions_by_hand() -> None:
    config = tiny.make_model("chatglm").config  # <sop> 6, [gMASK] 7, [MASK] 8, <eop> 1
    made = positions_of(np.array([20, 21, 7, 6, 30, 31, 1]), config)
    assert made.tolist() == [[0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3, 4]]
    made = positions_of(np.array([20, 8, 21, 8, 22, 6, 30, 1, 6, 31, 32, 1]), config)  # two spans
    assert made.tolist() == [[0, 1, 2, 3, 4, 1, 1, 1, 3, 3, 3, 3], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2, 3, 4]]
    assert positions_of(np.array([20, 21, 22]), config).tolist() == [[0, 0, 0], [1, 2, 3]]


def test_prompts_see_both_ways_and_answers_do_not() -> None:
    model = tiny.make_model("chatglm")
    ids = torch.tensor([[20, 21, 22, 7, 6, 30, 31, 32]])
    later_prompt, later_answer = ids.clone(), ids.clone()
    later_prompt[0, 2], later_answer[0, 6] = 99, 99
    with torch.no_grad():
        first, moved, kept = (model(one).logits for one in (ids, later_prompt, later_answer))
    assert (first[0, 0] - moved[0, 0]).abs().max() > 1e-3
    assert torch.equal(first[0, :6], kept[0, :6])


def test_left_padded_rows_are_the_rows_alone() -> None:
    model = tiny.make_model("chatglm")
    short, long = torch.tensor([[20, 7, 6, 30]]), torch.tensor([[21, 22, 23, 24, 7, 6, 31, 32]])
    both = torch.cat([torch.cat([torch.full((1, 4), 3), short], dim=1), long])
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    with torch.no_grad():
        together = model(both, attention_mask=mask).logits
        assert (together[0, 4:] - model(short).logits[0]).abs().max() <= 1e-5
        assert (together[1] - model(long).logits[0]).abs().max() <= 1e-5
    assert together.isfinite().all()
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    side_by_side = model.generate(both[:, :-1], attention_mask=mask[:, :-1], **how)[:, -6:]
    alone = [model.generate(row[:, :-1], **how)[0, -6:] for row in (short, long)]
    assert torch.equal(side_by_side, torch.stack(alone))


def test_the_cache_changes_nothing() -> None:
    model = tiny.make_model("chatglm")
    ids = torch.tensor([[20, 21, 7, 6]])
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.shared
@pytest.mark.parametrize("version", VERSIONS[1:])
def test_the_way_back_is_bit_for_bit(version: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "golden" / version
    load_model(folder).save_pretrained(str(tmp_path / "native"))
    stored = load_file(folder / "model.safetensors")
    for shard, files in ((2**40, 1), (100_000, 7)):
        target = tmp_path / f"back-{files}"
        done = export(tmp_path / "native", target, shard=shard)
        assert isinstance(done, Exported)
        assert done.tensors == len(stored)
        assert (done.files > 1) == (files > 1)
        back: dict[str, torch.Tensor] = {}
        for file in target.glob("*.safetensors"):
            back |= load_file(file)
        assert back.keys() == stored.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
        values = json.loads((target / "config.json").read_text())
        theirs = json.loads((folder / "config.json").read_text())
        assert all(values[name] == theirs[name] for name in original.NEEDED)
        expected = load_file(folder / "expected.safetensors")
        with torch.no_grad():
            logits = load_model(target)(**inputs(expected)).logits
        assert (logits - expected["logits"])[expected["attention_mask"].bool()].abs().max() <= 1e-4
    with pytest.raises(ModelError, match="is in its published layout already"):
        export(target, tmp_path / "twice")
    with pytest.raises(RunFolderError, match="nothing of yours is overwritten"):
        export(tmp_path / "native", target)


def small(tmp_path: Path, **changes: Any) -> Path:
    """A ChatGLM2 in its published layout, made here."""
    values = {
        "model_type": "chatglm", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "kv_channels": 8, "padded_vocab_size": 64, "multi_query_attention": True, "multi_query_group_num": 2,
        "add_qkv_bias": True, "seq_length": 128, "rmsnorm": True, "auto_map": {"AutoModel": "evil.Model"}, **changes,
    }  # fmt: skip
    from transformers import GlmForCausalLM

    torch.manual_seed(0)
    model = GlmForCausalLM(original.config_of(values))
    state = model.state_dict()
    folder = tmp_path / "small"
    folder.mkdir()
    save_file(dict(original.published(state, lambda name: state[name])), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_published_folder_of_our_own_loads_in_every_precision(tmp_path: Path) -> None:
    folder = small(tmp_path)
    ids = torch.arange(5, 25)[None]
    ways: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"quant": "int8"}, {"quant": "nf4"}]
    for how in ways:
        model = load_model(folder, **how)
        assert type(model).__name__ == "GlmForCausalLM"
        with torch.no_grad():
            assert model(input_ids=ids).logits.isfinite().all()


def test_the_ratio_of_the_32k_models(tmp_path: Path) -> None:
    """ChatGLM3's code multiplies the base by it, ChatGLM2's divides the positions by it."""
    third = read_config(small(tmp_path, rope_ratio=50, _name_or_path="THUDM/chatglm3-6b-32k"))
    assert third.rope_parameters["rope_theta"] == 500_000
    assert third.rope_parameters["rope_type"] == "default"
    (tmp_path / "two").mkdir()
    second = read_config(small(tmp_path / "two", rope_ratio=50, _name_or_path="THUDM/chatglm2-6b-32k"))
    assert second.rope_parameters["rope_type"] == "linear"
    assert second.rope_parameters["factor"] == 50
    from transformers import GlmForCausalLM

    angles = [GlmForCausalLM(config).model.rotary_emb.inv_freq for config in (second, third)]
    powers = torch.arange(0, 4, 2) / 4  # half of a head of 8, two by two
    assert torch.allclose(angles[0], 1 / 10_000**powers / 50)
    assert torch.allclose(angles[1], 1 / 500_000**powers)
    assert original.published_config(third)["rope_ratio"] == 50
    assert original.published_config(second)["rope_ratio"] == 50
    for config in (second, third):
        again = original.config_of(original.published_config(config))
        assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_bit": 4}, "packed into 4 bits by its own code"),
        ({"rmsnorm": False}, "differs from the published ones"),
        ({"post_layer_norm": False}, "differs from the published ones"),
        ({"kv_channels": None}, None),
    ],
)
def test_other_chatglms_are_refused(changes: dict, message: str | None) -> None:
    values = {
        "model_type": "chatglm", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "kv_channels": 8, "padded_vocab_size": 64, **changes,
    }  # fmt: skip
    if message is None:
        del values["kv_channels"]
        message = "no kv_channels"
    with pytest.raises(ModelError, match=message):
        original.config_of(values)


def test_a_model_of_another_kind_has_no_published_layout(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no other layout to be published in"):
        export(tiny.save("llama", tmp_path / "llama"), tmp_path / "out")
    with pytest.raises(ModelError, match="--to onnx"):
        export(tmp_path / "llama", tmp_path / "out", to="onnx")


def test_a_published_folder_is_never_there_in_full_while_it_is_quantized(tmp_path: Path) -> None:
    """Tensors are renamed and split as views of a mapped file; each is copied when its turn comes."""
    from fitune.models import precision
    from support.peak import _peak

    folder = small(tmp_path, num_layers=16, hidden_size=256, ffn_hidden_size=512, kv_channels=64)
    peak, model = _peak(lambda: load_model(folder, quant="nf4"), folder)
    packed = sum(part.bytes for part in precision.kept(model))
    whole = (folder / "model.safetensors").stat().st_size
    assert packed < whole / 4
    assert peak <= packed + 2 * (2 * 512 * 256 * 4) + 2**20


# ---- the published vocabularies and tokenizers ----


def maker() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_chatglm", ROOT / "scripts" / "make_chatglm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


@pytest.mark.shared
@pytest.mark.parametrize("version", [1, 2, 3])
def test_published_layouts_with_their_tokenizers_train_and_chat(version: int, shared: Path, tmp_path: Path) -> None:
    words = shared / "tokenizers" / ("chatglm1" if version == 1 else "chatglm2")
    folder = maker()(version, tmp_path / "model", words)
    name = {1: "chatglm", 2: "chatglm2", 3: "chatglm3"}[version]
    data = shared / "data" / ("glaive_toolcall_zh_demo.json" if version == 3 else "advertisegen_dev/dev.json")
    columns: dict[str, Any] = {} if version == 3 else {"map": {"content": "prompt", "summary": "completion"}}
    longest = 640 if version == 3 else 160  # lists of tools are never cut
    steps = 10 if version == 3 else 6
    done = fitune.train(
        model=str(folder), data=[str(data)], take=24, max_length=longest, max_lost=1.0, batch_size=2, max_steps=steps,
        lr=2e-2, precision="fp32", lora={"targets": "all-linear"}, sample_prompts=0, skip_bad=True, device="cpu",
        output=str(tmp_path / "run"), **columns,
    )  # fmt: skip
    assert done.last_loss < done.first_loss
    assert done.held_out_loss_after is not None
    assert done.held_out_loss_before is not None
    assert done.held_out_loss_after < done.held_out_loss_before
    tuned = fitune.load(tmp_path / "run")
    assert tuned.template.name == name
    model: Any = tuned.model
    assert len(model.get_base_model().get_input_embeddings().weight) == (130_528 if version == 1 else 65_024)
    asked = [Message("user", "你好"), Message("assistant", "你好！"), Message("user", "再见")]
    tools = ({"type": "function", "function": {"name": "now", "description": "time", "parameters": {}}},)
    ids = tuned.encoder.prompt(asked, tools if version == 3 else ())
    roles = tuned.tokenizer.convert_ids_to_tokens(ids)
    if version == 1:
        assert roles[-2:] == ["[gMASK]", "<sop>"]
        assert tuned.encoder.stop_ids == [130_005]
    elif version == 2:
        assert roles[:2] == ["[gMASK]", "sop"]
    else:
        assert [r for r in roles if r.startswith("<|")] == [
            "<|system|>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>",
        ]  # fmt: skip
        assert '"name": "now"' in tuned.tokenizer.decode(ids)
        stops = tuned.tokenizer.convert_ids_to_tokens(tuned.encoder.stop_ids)
        assert {"<|user|>", "<|observation|>"} <= set(stops)
    fitune.generate(tuned, "你好", max_new_tokens=4)


# ---- gaps that are filled in ----


def span_tokenizer() -> Any:
    """The tiny tokenizer with ChatGLM's special tokens, at the ids of the tiny ChatGLM."""
    special = ["<pad>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "x", "<sop>", "[gMASK]", "[MASK]"]
    made = tiny.make_tokenizer(special)
    made.eos_token = "<eop>"
    made.chat_template = None
    return made


def test_gaps_in_a_prompt_are_answered_each_behind_its_own_sop(tmp_path: Path) -> None:
    from fitune.core.records import Source
    from fitune.data.conversations import to_conversation
    from fitune.data.encode import Encoder
    from fitune.data.templates import TABLE

    words = span_tokenizer()
    encoder = Encoder(words, TABLE["chatglm"])
    row = {"prompt": "the [MASK] of [MASK] is Mira", "completion": ["capital", "Norland"]}
    conversation = to_conversation(row, Source("f", 1))
    sample = encoder.samples(conversation)[0]
    texts = words.convert_ids_to_tokens(sample.ids.tolist())
    assert [t for t in texts if t in ("[MASK]", "[gMASK]", "<sop>", "<eop>")] == [
        "[MASK]", "[MASK]", "<sop>", "<eop>", "<sop>", "<eop>",
    ]  # fmt: skip
    assert words.decode(sample.ids[sample.mask]) == "capital<eop>Norland<eop>"
    config = tiny.make_model("chatglm").config
    place, block = positions_of(sample.ids, config)
    gaps = np.flatnonzero(sample.ids == config.mask_token_id)
    starts = np.flatnonzero(sample.ids == config.bos_token_id)
    assert [int(place[start]) for start in starts] == gaps.tolist()
    assert [int(block[start]) for start in starts] == [1, 1]
    assert encoder.prompt(conversation.messages[:1])[-1] == config.bos_token_id
    one = to_conversation({"prompt": "the [MASK] is", "completion": "capital"}, Source("f", 2))
    assert config.gmask_token_id not in encoder.samples(one)[0].ids
    none = to_conversation({"prompt": "what is it", "completion": "capital"}, Source("f", 3))
    assert config.gmask_token_id in encoder.samples(none)[0].ids


def test_wrong_numbers_of_answers_and_other_templates_are_refused() -> None:
    from fitune.core.errors import DataError
    from fitune.core.records import Source
    from fitune.data.conversations import to_conversation
    from fitune.data.encode import Encoder
    from fitune.data.templates import TABLE

    for fields in (("prompt", "completion"), ("instruction", "output"), ("context", "target")):
        row = {fields[0]: "a [MASK] b [MASK]", fields[1]: ["one"]}
        with pytest.raises(DataError, match=r"f:1:\w+: as many answers as gaps are needed"):
            to_conversation(row, Source("f", 1))
    row = {"prompt": "a [MASK] b [MASK]", "completion": ["one", "two"]}
    with pytest.raises(DataError, match=r"f:1: .*has no place for that"):
        Encoder(tiny.make_tokenizer(), TABLE["alpaca"]).samples(to_conversation(row, Source("f", 1)))


@pytest.mark.parametrize("methods", [["lora"], pytest.param(["prefix", "prompt"], marks=pytest.mark.full)])
def test_a_first_chatglm_learns_to_fill_gaps_and_to_chat(methods: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.make_model("chatglm").save_pretrained(str(folder))
    span_tokenizer().save_pretrained(str(folder))
    data = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "the [MASK] of [MASK]", "completion": ["capital", "Norland"]},
        {"prompt": "two plus [MASK]", "completion": "three"},
        {"prompt": "the capital", "completion": "is Mira"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 12))
    for method in methods:
        more: dict[str, Any] = {"lr": 0.3, "max_steps": 60}
        if method == "lora":  # the answers themselves
            more = {"lr": 1e-2, "max_steps": 100, "lora": {"targets": "all-linear"}}
        done = fitune.train(
            model=str(folder), data=[str(data)], template="chatglm", method=method, precision="fp32",
            output=str(tmp_path / method), batch_size=6, sample_prompts=0, **more,
        )  # fmt: skip
        assert done.last_loss < 0.7 * done.first_loss
    if "lora" not in methods:
        return
    tuned = fitune.load(tmp_path / "lora")
    assert fitune.generate(tuned, "the capital") == "is Mira"
    assert fitune.generate(tuned, "the [MASK] of [MASK]") == "capital[MASK]Norland"
    assert fitune.generate(tuned, "two plus [MASK]") == "three"
    fitune.merge(tmp_path / "lora", tmp_path / "merged")
    assert fitune.generate(tmp_path / "merged", "the capital") == "is Mira"
