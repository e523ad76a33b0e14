"""Methods: published counts, work not done, runs that resume, adapters that go on and stand side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BloomConfig

import fitune
from fitune.checks import leak, modelchecks
from fitune.cli import main as cli
from fitune.commands.merge import merge
from fitune.commands.methods import overview
from fitune.commands.train import resume_config, train
from fitune.core import catalog
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError, ModelError, RunFolderError
from fitune.core.files import sha256
from fitune.core.records import Message
from fitune.data.batches import flat
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import load
from fitune.engine.step import hidden_states, loss_sum
from fitune.models import adapters, families, methods
from fitune.models.configs import config_of, without_weights
from fitune.models.load import load_model
from fitune.models.parts import groups
from fitune.models.prepare import ready
from fitune.models.switches import SDPA, attention
from support import tiny
from support.contract import IDS, KINDS, VARIANTS, config_for, logits, samples
from support.runs import Crash, CrashAt, digest


def config(method: str, **changes: Any) -> RunConfig:
    return build({"model": "m", "data": ["d"], "method": method, **changes})


# ---- counts that others have published ----

BLOOM = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16)
PUBLISHED = [
    ("full", {}, 1_303_111_680),
    ("bitfit", {}, 544_768),
    ("prompt", {"prompt": {"tokens": 7}}, 14_336),
    ("p-tuning", {"p_tuning": {"tokens": 10}}, 12_609_536),
    ("p-tuning", {"p_tuning": {"tokens": 10, "encoder": "lstm"}}, 193_030_144),
    ("prefix", {"prefix": {"tokens": 10}}, 983_040),
    ("prefix", {"prefix": {"tokens": 10, "projection": True}}, 205_641_728),
]


@pytest.mark.parametrize(("method", "changes", "count"), PUBLISHED)
def test_bloom_1b4_zh_trains_as_many_as_published(method: str, changes: dict, count: int) -> None:
    base = without_weights(BLOOM)
    assert sum(p.numel() for p in base.parameters()) == 1_303_111_680
    assert methods.find(method).count(base, families.of(base), config(method, **changes)) == count


def test_llama_32_1b_with_lora_on_q_and_v() -> None:
    base = without_weights(config_of(catalog.find("llama-3.2-1b").config))
    lora = methods.find("lora").count(base, families.of(base), config("lora"))
    total = lora + sum(p.numel() for p in base.parameters())
    assert (lora, total, f"{lora / total:.4%}") == (851_968, 1_236_666_368, "0.0689%")


def test_the_table_of_methods_has_every_method_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for row in overview()}
    assert list(rows) == [
        "full", "freeze", "tail", "bitfit", "bitfit, bitfit.add", "prompt", "p-tuning", "prefix", "adapter", "lora",
        "ia3", "peft:TYPE",
    ]  # fmt: skip
    assert "VERA" in rows["peft:TYPE"].note
    assert rows["lora"].training_bytes == 16 * 851_968
    assert rows["bitfit"].trainable is None
    assert "has no bias terms" in rows["bitfit"].note
    assert [row.name for row in rows.values() if not row.merges] == ["prompt", "p-tuning", "prefix", "adapter"]
    assert all(row.why_lr and row.default_lr > 0 and row.trains for row in rows.values())
    folder = tiny.save("bloom", tmp_path / "bloom")
    (folder / "model.safetensors").unlink()  # no weights are needed
    monkeypatch.setattr(sys, "argv", ["fitune", "methods", "--model", str(folder), "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert {row["name"]: row["trainable"] for row in json.loads(out)["methods"]}["bitfit"] > 0
    assert "low-rank" in err


# ---- families ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_names_parts_that_are_there(kind: str) -> None:
    model = tiny.make_model(kind)
    family = families.of(model)
    assert family.found == (kind in tiny.UNKNOWN)
    blocks = family.block_list(model)
    assert len(blocks) == 3
    for block in blocks:
        for name in family.projections():
            assert block.get_submodule(name).weight.ndim == 2
    linear = {
        name for name, module in blocks[0].named_modules() if hasattr(module, "weight") and module.weight.ndim == 2
    }
    assert linear == set(family.projections())
    assert "norm" in type(model.get_submodule(family.final_norm)).__name__.lower()
    found = modelchecks.family_found(family)
    assert found.level == ("warn" if kind in tiny.UNKNOWN else "ok")
    assert family.blocks in found.text


def test_of_a_model_whose_names_say_nothing_the_blocks_are_found_and_their_parts_are_not() -> None:
    model = tiny.make_model("llama")
    for block in model.model.layers:
        block.something = block.self_attn
        del block.self_attn
    model.config.model_type = "strange"
    found = families.of(model)
    assert (found.blocks, found.final_norm, found.lora_targets) == ("model.layers", "model.norm", ("q_proj", "v_proj"))
    with pytest.raises(ConfigError, match="have parts by other names"):
        found.whole("houlsby")


def test_a_model_without_a_list_of_blocks_is_refused_with_what_is_missing() -> None:
    model = tiny.make_model("llama")
    model.model.blocks = torch.nn.ModuleDict({str(n): block for n, block in enumerate(model.model.layers)})
    del model.model.layers
    model.config.model_type = "strange"
    with pytest.raises(ModelError, match="does not show the list of transformer blocks"):
        families.of(model)


@pytest.mark.parametrize("length", [1, 40])
def test_bloom_in_a_flat_batch_is_bloom_alone(length: int) -> None:
    """Logits of each document, within 1e-5; and a bias that is not the document's own would be noticed."""
    model: Any = ready(tiny.make_model("bloom"))
    made = [*samples(), *(s for s in samples() for _ in range(length // 20))]
    batch = flat(made, range(len(made)))
    with torch.no_grad(), attention(model, SDPA):
        together = model.lm_head(hidden_states(model, batch, "flat"))
        alone = torch.cat([model(torch.from_numpy(s.ids)[None].long()).logits[0] for s in made])
        assert (together - alone).abs().max() < 1e-5
        leaking = model(torch.from_numpy(batch.ids)[None]).logits[0]
    assert (leaking - alone).abs().max() > 1e-2


# ---- what is trained, and what is not worked on ----


def test_the_backward_pass_stops_at_the_first_trainable_block() -> None:
    """Counted FLOPs: frozen blocks cost a forward pass and nothing else."""

    def work(**freeze: Any) -> int:
        model = adapters.attach(ready(tiny.make_model("llama")), config("freeze", freeze=freeze))
        with FlopCounterMode(display=False) as counter:
            hidden_states(model, flat(samples(), range(5)), "flat").sum().backward()
        return counter.get_total_flops()

    def forward() -> int:
        model = ready(tiny.make_model("llama"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hidden_states(model, flat(samples(), range(5)), "flat")
        return counter.get_total_flops()

    per_block = forward() / 3
    one, two, three = work(blocks=1), work(blocks=2), work(blocks=3)
    # each block that is trained costs its two backward products, twice its forward; attention a little more
    assert 1.9 * per_block < two - one < 2.6 * per_block
    assert two - one == three - two


def test_groups_add_up_and_name_every_part() -> None:
    model = adapters.attach(ready(tiny.make_model("llama")), config("freeze", freeze={"blocks": 1, "head": True}))
    parts = groups(model, families.of(model))
    assert [name for name, _, _ in parts] == ["embedding", "block 0", "block 1", "block 2", "final norm", "head"]
    assert [trained > 0 for _, trained, _ in parts] == [False, False, False, True, False, True]
    assert sum(total for _, _, total in parts) == sum(p.numel() for p in model.parameters())
    wrapped: Any = adapters.attach(ready(tiny.make_model("gpt2")), config("lora"))
    parts = groups(wrapped, families.of(wrapped.get_base_model()))
    assert sum(trained for _, trained, _ in parts) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "changes", "kind", "message"),
    [
        ("freeze", {"freeze": {"blocks": 9}}, "llama", "freeze.blocks: more than there are"),
        ("freeze", {"freeze": {"tensors": 900}}, "llama", "freeze.tensors: more than there are"),
        ("freeze", {"freeze": {"blocks": 0}}, "llama", "nothing would be trained"),
        ("freeze", {"freeze": {"patterns": ["k_porj"]}}, "llama", "did you mean 'k_proj'?"),
        ("freeze", {"freeze": {"patterns": ["("]}}, "llama", "is no regular expression"),
        ("freeze", {"freeze": {"head": True}}, "qwen2", "output head is its embedding"),
        ("tail", {"tail": {"head": True}}, "gpt2", "output head is its embedding"),
        ("bitfit", {}, "llama", "--bitfit.add"),
        ("lora", {"lora": {"targets": ["q_porj"]}}, "llama", "did you mean 'q_proj'?"),
        ("lora", {"lora": {"ranks": {"up_proj": 4}}}, "llama", "lora.ranks: 'up_proj' matches no target"),
        ("lora", {"lora": {"save": ["nothing"]}}, "llama", "lora.save: this model has no module 'nothing'"),
        ("lora", {"lora": {"save": ["lm_head"]}}, "qwen2", "output head is its embedding"),
        ("ia3", {"ia3": {"targets": ["v_porj"]}}, "llama", "did you mean 'v_proj'?"),
        ("peft:LOHA", {"peft": {"target_modules": "q_porj"}}, "llama", "did you mean 'q_proj'?"),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_that_helps(
    method: str, changes: dict, kind: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapters.attach(ready(tiny.make_model(kind)), config(method, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lroa"}, "did you mean 'lora'?"),
        ({"method": "peft:LOHAA"}, "did you mean 'LOHA'?"),
        ({"method": "peft:LOHA", "peft": {"rr": 4}}, "peft.rr: LOHA has no such setting"),
        ({"method": "lora", "lora": {"init": "pissa", "dora": True}}, "goes neither with dora nor with ranks"),
        ({"method": "prompt", "prompt": {"init": "text"}}, "prompt.init=text and prompt.text belong together"),
        ({"method": "full", "lora": {"rank": 4}}, "settings of lora are given, but the method is full"),
        ({"adapter": "nowhere"}, "nowhere: no adapter here"),
        ({"method": "freeze", "freeze": {"tensors": 2, "patterns": ["q"]}}, "freeze: tensors and patterns are given"),
        ({"method": "peft:ADALORA"}, "needs more than plain training steps"),
        ({"new_tokens": ["<a>"], "lora": {"save": ["head"]}}, "new_tokens and lora.save do not go together"),
    ],
)
def test_settings_that_do_not_go_together_are_reported_before_anything_is_loaded(
    values: dict, message: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        train(build({"model": str(model_folder), "data": [str(data_file)], "output": str(tmp_path / "run"), **values}))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_lora_options_reach_peft() -> None:
    options = {"rank": 4, "targets": ["q_proj", "v_proj"], "ranks": {"v_proj": 2}, "save": ["head", "embeddings"]}
    model = adapters.attach(ready(tiny.make_model("llama")), config("lora", lora=options))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert {shape[0] for name, shape in shapes.items() if "q_proj.lora_A" in name} == {4}
    assert {shape[0] for name, shape in shapes.items() if "v_proj.lora_A" in name} == {2}
    assert sum("modules_to_save" in name for name in shapes) == 2
    plus = methods.find("lora")
    faster = config("lora", lora={"b_rate": 16})
    assert plus.rates(faster, "x.lora_B.default.weight") == 16
    assert plus.rates(faster, "x.lora_A.default.weight") == 1


def test_a_prompt_begins_as_its_words(model_folder: Path) -> None:
    options = {"tokens": 6, "init": "text", "text": "hi"}
    model: Any = adapters.attach(load_model(model_folder), build(
        {"model": str(model_folder), "data": ["d"], "method": "prompt", "prompt": options}
    ))  # fmt: skip
    ids = tiny.make_tokenizer()("hi")["input_ids"]
    words = model.get_input_embeddings().weight
    expected = torch.stack([words[ids[n % len(ids)]] for n in range(6)])
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)
    with pytest.raises(ConfigError, match=r"prompt\.text has more tokens"):
        adapters.attach(load_model(model_folder), build(
            {"model": str(model_folder), "data": ["d"], "method": "prompt",
             "prompt": {"tokens": 2, "init": "text", "text": "北国的首都是米拉吗"}}
        ))  # fmt: skip


# ---- whole runs ----

STEPS = {"max_steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 4, "lr": 1e-2, "sample_prompts": 0}


def settings(variant: str, model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = {"model": str(model), "data": [str(data)], "output": str(output), "sample_tokens": 4, **STEPS}
    return {**values, **VARIANTS[variant], **changes}


# what a checkpoint holds: weights of the model itself, all or some, new layers, new biases,
# an encoder of virtual tokens, keys and values, our own modules, and of LoRA what saves something else than it
# trains; VeRA's frozen matrices come from a seed
RESUMED = (
    "full",
    "freeze",
    "tail",
    "bitfit-add",
    "p-tuning",
    "prefix",
    "houlsby",
    "lora-pissa",
    "peft:VERA",
)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(one, marks=[] if one in RESUMED else pytest.mark.full)
        for one in [v for v in VARIANTS if v not in ("bitfit", "freeze-tensors", "prompt-random")]
    ],
)
def test_a_run_resumed_in_mid_epoch_is_the_unbroken_one(
    variant: str, model_folder: Path, tmp_path: Path, data_file: Path
) -> None:
    changes: dict[str, Any] = {}
    if VARIANTS[variant]["method"] == "lora" and "dora" not in variant:
        changes["lora"] = {**VARIANTS[variant]["lora"], "dropout": 0.2}
    if variant == "p-tuning-lstm":
        changes["checkpointing"] = True
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(build(settings(variant, model_folder, data_file, whole, **changes)))
    with pytest.raises(Crash):
        train(build(settings(variant, model_folder, data_file, broken, **changes)), watch=CrashAt(3))
    torch.manual_seed(99)
    train(resume_config(str(broken), {}), resume=True)
    assert digest(whole) == digest(broken)
    records = [[(r.loss, r.grad_norm, r.held_out_loss) for r in RunFolder(run).read_steps()] for run in (whole, broken)]
    assert records[0] == records[1]
    encoder = whole / "adapter" / "encoder.safetensors"
    assert encoder.is_file() == (variant in ("p-tuning", "p-tuning-lstm", "prefix-projected"))
    if encoder.is_file():
        assert sha256(encoder) == sha256(broken / "adapter" / "encoder.safetensors")
    tuned = load(whole)
    assert isinstance(fitune.generate(tuned, "你好", max_new_tokens=3), str)
    assert isinstance(fitune.generate(tuned, "你好", max_new_tokens=3, base=True), str)
    plain = load(model_folder)
    assert fitune.generate(tuned, "hello", max_new_tokens=8, base=True) == fitune.generate(
        plain, "hello", max_new_tokens=8
    )


def test_a_resume_that_restores_only_what_peft_saves_would_be_noticed(
    model_folder: Path, tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap of P-tuning: the encoder is part of the state, not only what it gives."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(build(settings("p-tuning", model_folder, data_file, whole)))
    with pytest.raises(Crash):
        train(build(settings("p-tuning", model_folder, data_file, broken)), watch=CrashAt(3))
    read = RunFolder.load

    def forgetful(self: RunFolder, path: Path) -> Any:
        loaded = read(self, path)
        for name, tensor in loaded.trainable.items():
            if "mlp_head" in name:
                tensor.mul_(0.5)
        return loaded

    monkeypatch.setattr(RunFolder, "load", forgetful)
    train(resume_config(str(broken), {}), resume=True)
    assert digest(whole) != digest(broken)


@pytest.mark.parametrize(  # quick: PEFT's own file, an encoder beside it, weights of the base model
    "variant",
    [
        "lora",
        "p-tuning",
        "freeze",
        *(pytest.param(v, marks=pytest.mark.full) for v in ("houlsby", "prefix-projected", "ia3")),
    ],
)
def test_training_goes_on_from_an_adapter(variant: str, model_folder: Path, tmp_path: Path, data_file: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = train(build(settings(variant, model_folder, data_file, first)))
    again = train(build(settings(variant, model_folder, data_file, second, adapter=str(first), max_steps=1)))
    assert again.held_out_loss_before == pytest.approx(done.held_out_loss_after, abs=1e-6)
    assert again.held_out_loss_before != done.held_out_loss_before
    assert digest(first) != digest(second)
    other = {"ia3": "lora", "lora": "houlsby"}.get(variant, "ia3")
    with pytest.raises(ModelError, match="was trained with another method or other settings"):
        train(build(settings(other, model_folder, data_file, tmp_path / "third", adapter=str(first))))


def test_an_adapter_of_another_rank_is_refused(model_folder: Path, tmp_path: Path, data_file: Path) -> None:
    train(build(settings("lora", model_folder, data_file, tmp_path / "first")))
    changes = {"adapter": str(tmp_path / "first" / "adapter"), "lora": {"rank": 8}}
    with pytest.raises(ModelError, match=r"differing"):
        train(build(settings("lora", model_folder, data_file, tmp_path / "second", **changes)))


def test_a_prefix_that_peft_puts_into_wrong_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT before 0.20, of Gemma 2 and 3: attached, and as an adapter that a later PEFT made."""
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    adapters.save(adapters.attach(ready(tiny.make_model("gemma2")), config_for("prefix")), tmp_path)
    ready(tiny.make_model("gemma2"), adapter=tmp_path)
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ConfigError, match="wrong layers of gemma2") as caught:
        adapters.attach(ready(tiny.make_model("gemma2")), config_for("prefix"))
    assert "peft 0.19.1" in str(caught.value)
    with pytest.raises(ConfigError, match="wrong layers of gemma2"):
        ready(tiny.make_model("gemma2"), adapter=tmp_path)
    adapters.attach(ready(tiny.make_model("llama")), config_for("prefix"))


@pytest.mark.parametrize("variant", ["lora", "houlsby", "ia3"])
def test_adapters_stand_side_by_side(variant: str, model_folder: Path, tmp_path: Path) -> None:
    """Two of one kind on one base: each gives what it gives alone, and turned off they are the base."""
    for seed in (1, 2):
        model = adapters.attach(load_model(model_folder), config_for(variant, seed=seed))
        with torch.no_grad():
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        adapters.save(model, tmp_path / str(seed))
    alone = [logits(load_model(model_folder, adapter=tmp_path / str(seed))) for seed in (1, 2)]
    both = load_model(model_folder, adapter=tmp_path / "1")
    base = logits(load_model(model_folder))
    assert torch.equal(logits(both), alone[0])
    adapters.add(both, tmp_path / "2", "second")
    assert torch.equal(logits(both), alone[1])
    adapters.switch(both, "default")
    assert torch.equal(logits(both), alone[0])
    with adapters.disabled(both):
        assert torch.equal(logits(both), base)
    adapters.switch(both, "second")
    assert torch.equal(logits(both), alone[1])
    assert (alone[0] - alone[1]).abs().max() > 1e-3


# ---- merging ----


@pytest.mark.parametrize(  # test_contract merges every method; quick: a product, more layers, more biases
    "variant",
    [
        "lora",
        "tail-interleaved",
        "bitfit-add",
        *(pytest.param(v, marks=pytest.mark.full) for v in ("lora-pissa", "full")),
    ],
)
def test_a_merged_run_is_a_plain_model(variant: str, model_folder: Path, tmp_path: Path, data_file: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "merged"
    train(build(settings(variant, model_folder, data_file, run, template="alpaca")))
    done = merge(run, target)
    assert done.dtype == "fp32"
    assert done.merge_error < 1e-5
    assert done.rounding_error < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32).eval()
    tuned = load(run)
    with torch.no_grad():
        assert (plain(IDS).logits - logits(tuned.model)).abs().max() < 1e-4
    if variant == "tail-interleaved":
        assert plain.config.num_hidden_layers == 5
    again = load(target)
    assert again.template.name == "alpaca"  # the template that it was trained with
    assert again.encoder.prompt([Message("user", "a")]) == tuned.encoder.prompt([Message("user", "a")])
    assert fitune.generate(again, "hello", max_new_tokens=5) == fitune.generate(tuned, "hello", max_new_tokens=5)
    with pytest.raises(RunFolderError, match="nothing of yours is overwritten"):
        merge(run, target)
    assert merge(run, tmp_path / "half", dtype="bf16").rounding_error > 1e-4
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_merged_says_why(
    model_folder: Path,
    tmp_path: Path,
    data_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    train(build(settings("houlsby", model_folder, data_file, run)))
    monkeypatch.setattr(sys, "argv", ["fitune", "merge", str(run), "--output", str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "adapter cannot be merged: its activation function" in err
    assert "fix:" in err
    assert not (tmp_path / "merged").exists()


def test_merge_on_the_command_line(
    model_folder: Path,
    tmp_path: Path,
    data_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(build(settings("lora", model_folder, data_file, tmp_path / "run")))
    arguments = ["merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "bf16", "--json"]
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["dtype"] == "bf16"
    assert "relative error of the logits" in err


# ---- new tokens ----


# a head of its own, and a tied one; quick: of PEFT's methods, virtual tokens and new layers one each
WITH_TOKENS = (("lora", "llama"), ("prefix", "qwen2"), ("tail", "llama"))
BESIDE = [
    pytest.param(variant, kind, marks=[] if (variant, kind) in WITH_TOKENS else pytest.mark.full)
    for variant in ("lora", "prefix", "p-tuning", "houlsby", "freeze", "full", "tail", "ia3")
    for kind in ("llama", "qwen2")
]


@pytest.mark.parametrize(("variant", "kind"), BESIDE)
def test_new_tokens_are_trained_beside_any_method_and_saved(variant: str, kind: str, tmp_path: Path) -> None:
    model, data, run = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"
    tiny.make_tokenizer().save_pretrained(str(model))  # 345 tokens: llama has rows to spare, qwen2 gets more
    tiny.make_model(kind, vocabulary=400 if kind == "llama" else 345).save_pretrained(str(model))
    rows = [{"prompt": f"what is {n}?", "completion": f"<think>two{n}</think> {n}"} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(variant, model, data, run, new_tokens=["<think>", "</think>"], max_steps=3)
    train(build(values))
    tuned = load(run)
    ids = [tuned.tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
    assert tuned.tokenizer("a<think>b", add_special_tokens=False)["input_ids"].count(ids[0]) == 1
    trained = load_file(run / "adapter" / "new_tokens.safetensors")
    assert {name: tuple(t.shape) for name, t in trained.items()} == dict.fromkeys(
        ["embedding"] if kind == "qwen2" else ["embedding", "head"], (2, 32)
    )
    probe = torch.tensor([[5, ids[0], 9, ids[1]]])
    with torch.no_grad():
        whole: Any = tuned.model
        inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        assert torch.equal(inner.get_input_embeddings()(probe)[0, 1], trained["embedding"][0])
    again = tmp_path / "again"
    with pytest.raises(Crash):
        train(build({**values, "output": str(again)}), watch=CrashAt(2))
    train(resume_config(str(again), {}), resume=True)
    assert digest(run) == digest(again)
    assert sha256(run / "adapter" / "new_tokens.safetensors") == sha256(again / "adapter" / "new_tokens.safetensors")
    on = train(build({**values, "output": str(tmp_path / "on"), "adapter": str(run), "max_steps": 1}))
    done = json.loads((run / "result.json").read_text())
    assert on.held_out_loss_before == pytest.approx(done["held_out_loss_after"], abs=1e-6)
    if variant in ("prefix", "p-tuning", "houlsby"):
        return
    target = tmp_path / "merged"
    assert merge(run, target).merge_error < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32).eval()
    with torch.no_grad():
        assert (plain(probe).logits - tuned.model(input_ids=probe).logits).abs().max() < 1e-4


def test_only_the_rows_of_new_tokens_change(tmp_path: Path, data_file: Path) -> None:
    from fitune.data.tokenizer.new_tokens import add_tokens
    from fitune.models.methods import new_tokens

    words = tiny.make_tokenizer()
    model: Any = ready(tiny.make_model("qwen2"))
    before = model.model.embed_tokens.weight.detach().clone()
    added = add_tokens(words, ["<think>", "北国"])
    assert added[0].pieces == tuple(tiny.make_tokenizer()("<think>")["input_ids"])
    new_tokens.add_rows(model, added)
    tuned: Any = adapters.attach(model, config("lora"))
    rows = new_tokens.rows(tuned.get_base_model())["embedding"]
    assert torch.allclose(rows[0], before[list(added[0].pieces)].mean(dim=0))
    start = rows.detach().clone()
    loss_sum(tuned, flat(samples(), range(5))).backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0  # through the tied head, though no sample has the token
    with torch.no_grad():
        rows.add_(rows.grad)
    assert not torch.equal(rows, start)
    assert torch.equal(tuned.get_base_model().model.embed_tokens.weight[: len(before)], before)
    assert not tuned.get_base_model().model.embed_tokens.weight.requires_grad


def test_tokens_that_a_tokenizer_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="new_tokens: wrong value"):
        config("lora", new_tokens=["<a>", "<a>"])


# ---- what was once wrong ----


def test_batched_answers_of_virtual_tokens_are_the_answers_one_by_one(model_folder: Path, tmp_path: Path) -> None:
    from fitune.core.records import Conversation
    from fitune.data.encode import Encoder
    from fitune.data.templates import choose
    from fitune.engine.drawing import Sampling
    from fitune.engine.generation import answers
    from fitune.models.load import Tuned

    words = tiny.make_tokenizer()
    for variant in ("prompt", "prefix"):
        model: Any = adapters.attach(load_model(model_folder), config_for(variant))
        template = choose("auto", words)
        tuned = Tuned(model, words, template, Encoder(words, template), families.of(model.get_base_model()))
        asked = [Conversation((Message("user", text),)) for text in ("hi", "the capital of Norland is", "北国")]
        sampling = Sampling(max_new_tokens=8)
        assert answers(tuned, asked, sampling) == [answers(tuned, [one], sampling)[0] for one in asked]


def test_going_on_with_another_scale_is_refused(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """Alpha changes what was learned, and no shape shows it."""
    train(build(settings("lora", model_folder, data_file, tmp_path / "first")))
    changes = {"adapter": str(tmp_path / "first"), "lora": {"rank": 4, "alpha": 64}}
    with pytest.raises(ModelError, match=r"lora_alpha 16\.0"):
        train(build(settings("lora", model_folder, data_file, tmp_path / "second", **changes)))


def test_a_base_without_new_tokens_never_says_them(model_folder: Path) -> None:
    from fitune.data.tokenizer.new_tokens import add_tokens
    from fitune.models.methods import new_tokens

    words, model = tiny.make_tokenizer(), ready(tiny.make_model("gpt2", vocabulary=340))
    new_tokens.add_rows(model, add_tokens(words, ["<think>"]))
    tuned = adapters.attach(model, config("lora"))
    with adapters.disabled(tuned):
        assert logits(tuned)[..., -1].max() == float("-inf")
    assert logits(tuned)[..., -1].max() > float("-inf")


def test_an_unknown_adapter_name_is_refused(model_folder: Path) -> None:
    model = adapters.attach(load_model(model_folder), config_for("houlsby"))
    with pytest.raises(ModelError, match="did you mean 'default'"):
        adapters.switch(model, "defualt")


def test_rows_leave_room_for_virtual_tokens(tmp_path: Path) -> None:
    model = tiny.save("gpt2", tmp_path / "model")  # 256 positions and no more
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "two plus " * 200, "completion": "five"} for _ in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(build(settings("prompt", model, data, tmp_path / "run", max_length=251)))
    assert done.steps == 4
    with pytest.raises(ConfigError, match="above what the model can hold"):
        train(build(settings("prompt", model, data, tmp_path / "other", max_length=252)))


def test_a_resumed_run_finds_the_same_weights_and_template(tmp_path: Path, data_file: Path) -> None:
    model, run = tiny.save("llama", tmp_path / "model"), tmp_path / "run"
    with pytest.raises(Crash):
        train(build(settings("lora", model, data_file, run)), watch=CrashAt(3))
    settings_file = model / "tokenizer_config.json"
    values = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**values, "note": "changed"}))
    with pytest.raises(RunFolderError, match="the tokenizer changed since this run began"):
        train(resume_config(str(run), {}), resume=True)
    settings_file.write_text(json.dumps(values))
    tiny.make_model("llama", seed=5).to(torch.bfloat16).save_pretrained(str(model))
    with pytest.raises(RunFolderError, match="the base's weights"):
        train(resume_config(str(run), {}), resume=True)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_window_or_a_rope_that_depends_on_length_is_probed_with_whole_rows(layout: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = ready(LlamaForCausalLM(LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, rope_parameters=rope, initializer_range=0.2,
    )))  # fmt: skip
    long, short = (torch.randint(5, 300, (n,)).numpy().astype("int32") for n in (120, 10))
    data = [samples()[0].__class__(ids, ids > 0) for ids in (long, short)]
    _, finding = leak.packing_leak(model, data, layout)
    assert finding.level == "refuse", finding.text
    assert leak.packing_leak(model, data)[0] == "documents"
