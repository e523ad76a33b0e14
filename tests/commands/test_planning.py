"""`fitune plan` as its user meets it, the plan before a run, and the rehearsal of its largest step."""

from __future__ import annotations

import json
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import fitune
from fitune.commands import planned_rows, train_start
from fitune.commands import train as training
from fitune.commands.request import to_plan
from fitune.commands.train import resume_config, train
from fitune.commands.train_start import Rehearsal
from fitune.commands.verify import verify
from fitune.core import processor
from fitune.core.config import build
from fitune.core.errors import ConfigError, FituneError, ModelError, Problems, TrainingError
from fitune.core.events import Silent
from fitune.core.records import Conversation, Message, Sample, ToolCall
from fitune.data import tokenizer
from fitune.data.batches import Loader, flat
from fitune.data.store import lengths_of
from fitune.engine import optim, step_runner
from fitune.engine import step as engine_step
from fitune.engine.checkpoint import RunFolder
from fitune.engine.step_runner import StepRunner
from fitune.memory import closed, device, heap, steps, trace
from fitune.memory import plan as plans
from fitune.models import methods
from fitune.models.parts import trainable
from support import tiny
from support.command import run as command
from support.contract import samples
from support.hub_server import SHA, Server, ask
from support.memory_errors import OOM, make, runner
from support.messages import Messages
from support.runs import Crash, CrashAt, digest

MIB, GIB = 2**20, 2**30
SMALL = "qwen2.5-0.5b"
BUNDLED_ROWS = str(Path(fitune.__file__).parent / "bundled" / "data" / "train.jsonl")
SHAPE = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2000, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a model that nobody has, in a file of its own name."""
    path = tmp_path_factory.mktemp("shape") / "small.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture(scope="module")
def bare(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing but config.json: no tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text((model_folder / "config.json").read_text())
    return folder


def text_of(error: FituneError) -> str:
    return " ".join(str(error).split())


def planned(model: Any, **changes: Any) -> plans.Plan:
    return fitune.plan(model, **{"gpu": "24GB", "max_length": 64, "batch_size": 2, **changes})


# ---- the model ----


def test_a_catalog_name_is_planned_without_anything_at_hand() -> None:
    made = planned(SMALL.upper(), max_length=16, batch_size=1, method="bitfit")
    assert made.model == SMALL
    assert made.how == "trace"
    assert (made.total, made.tokens, made.rows) == (494_032_768, 16, 1)
    assert made.peak.parts["frozen weights"] + made.peak.parts["trainable weights"] >= 2 * made.total
    assert made.notes == ["no data given: every row has 16 tokens"]


def test_a_model_is_the_same_by_folder_config_or_another_file(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.json"
    other.write_text((model_folder / "config.json").read_text())
    made = [planned(name) for name in (model_folder, str(model_folder), model_folder / "config.json", other)]
    assert [one.model for one in made] == [model_folder.name] * 3 + ["mine.json"]
    assert len({json.dumps({**one.as_dict(), "model": ""}) for one in made}) == 1
    assert made[0].total - made[0].trainable == sum(p.numel() for p in tiny.make_model("llama").parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object received: [1]"),
        ("null", "not a JSON object received: None"),
        ("{}", "no model_type"),
        ('{"model_type": 3}', "no model_type"),
        ('{"model_type": "evil"}', "model_type 'evil' is unknown to transformers"),
        (json.dumps({**SHAPE, "hidden_size": "many"}), "wrong values received: "),
        (json.dumps({**SHAPE, "model_type": "llama", "num_attention_heads": 0}), "wrong values received: "),
        (json.dumps({**SHAPE, "vocab_size": 0}), "sizes that no model has received: vocab_size 0"),
        (json.dumps({**SHAPE, "num_key_value_heads": 3}), "num_attention_heads 8, num_key_value_heads 3"),
        (json.dumps({**SHAPE, "hidden_act": "nope"}), "KeyError: 'nope'"),
        (json.dumps({**SHAPE, "rope_theta": None}), "no model can be built from this config.json"),
        (json.dumps({**SHAPE, "quantization_config": {"quant_method": "gptq"}}), "a model quantized by gptq"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "mine.json"])
def test_a_file_that_is_no_config_is_reported(text: str, message: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    message = message.replace("no model_type", "no model_type") if name == "config.json" else message
    with pytest.raises(ModelError) as caught:
        planned(str(path))
    assert message in text_of(caught.value)


def test_an_unknown_name_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"of the catalog: qwen2\.5-0\.5b"):
        planned("qwen2.5-0.5")
    with pytest.raises(ModelError, match=r"no config\.json"):
        planned(str(tmp_path))


@pytest.fixture
def server(model_folder: Path) -> Iterator[Server]:
    """A hub on loopback that has the tiny model."""
    made = Server(model_folder)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_of_a_hub_only_the_config_is_fetched(
    server: Server, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """In a process of its own, as for downloads: the hub's client reads its address when it is imported."""
    arguments = ["--data", str(data_file), "--gpu", "24GB", "--max-length", "64", "--method", "lora"]
    code, seen, error = ask(server, tmp_path, "plan", "--json", "org/name", *arguments)
    assert code == 0, error
    asked = [path for _, path, _ in server.asked]
    files = {path for path in asked if "/resolve/" in path}
    assert files == {f"/org/name/resolve/{SHA}/config.json"}
    assert all(path.startswith("/api/") for path in asked if path not in files)  # what there is, but none of it
    assert set(server.served) == {"config.json"}
    assert seen["model"] == "org/name"
    assert "no tokenizer at hand" in seen["notes"][0]
    assert seen["total"] == planned(model_folder).total
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("tokenizer*"))


def test_of_modelscope_only_the_config_is_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    assert planned("ms:org/name").model == "ms:org/name"
    assert set(server.served) == {"config.json"}


# ---- the device ----


@pytest.mark.parametrize("text", ["24GB", "24GiB", "24gb", "24 GB", " 24G ", "24576MiB", "24576 mb", "24.0GB"])
def test_sizes_of_memory(text: str) -> None:
    found = device.find(text)
    assert (found.kind, found.budget, found.here) == ("cuda", 24 * GIB, False)


@pytest.mark.parametrize("text", ["rtx-4090", "RTX 4090", "rtx_4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090"])
def test_names_of_gpus(text: str) -> None:
    found = device.find(text)
    assert (found.name, found.budget, found.bf16) == ("rtx-4090", 24564 * MIB, True)
    assert found.tflops == 165.2


@pytest.mark.parametrize("text", ["nonsense", "", "0GB", "0MiB", "-5GB", "24", "24TB", "24GBs", "GB", "rtx-4091"])
def test_what_is_no_device_is_reported(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        device.find(text)
    for part in (f"--gpu {text!r}", "expected: a size such as 24GB, a GPU such as rtx-4090, or this-machine", "fix: "):
        assert part in text_of(caught.value)
    if text == "rtx-4091":
        assert "did you mean 'rtx-4090'?" in str(caught.value)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4070", "rtx-4070"),
        ("NVIDIA RTX A4000", "rtx-a4000"),
        ("Quadro P400", None),
    ],
)
def test_a_driver_s_name_finds_its_gpu_and_no_shorter_one(driver: str, name: str | None) -> None:
    found = device.by_driver(driver)
    assert (found and found.name) == name


def test_this_machine_is_asked_for_its_memory(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GIB))
    assert {device.find(text).here for text in (None, "this-machine", " This Machine ")} == {True}
    for text in (None, "this-machine"):
        made = planned(shape, gpu=text, device="cpu", precision="fp32")
        assert (made.device, made.gpu, made.reserved) == ("cpu", None, None)
        assert made.budget == pytest.approx(3 * GIB + made.outside["Python, torch and data"], rel=0.05)
        holes = {heap.HOLES} if heap.taken(os.environ, processor.glibc()) is not None else set()
        assert set(made.outside) == {"Python, torch and data", "kernels, threads and buffers", *holes}
        assert made.needed == made.allocated + sum(made.outside.values())
        assert made.fits is True
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MIB))
    made = planned(shape, gpu=None, device="cpu", max_length=512, batch_size=8)
    assert made.fits is False
    assert made.spare is not None
    assert made.spare < 0


def test_a_gpu_that_is_here_is_planned_for(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = device.Device("NVIDIA L4", "cuda", 20 * GIB, True, 121.0, here=True)
    monkeypatch.setattr(device, "here", lambda kind="auto": here)
    made = planned(shape, gpu=None, precision="bf16")
    assert (made.gpu, made.budget, made.device) == ("NVIDIA L4", 20 * GIB, "cuda")
    assert made.reserved is not None
    assert made.outside == {"CUDA context": device.CONTEXT}
    assert made.needed == (made.smallest or 0) + device.CONTEXT


def test_bf16_that_a_gpu_only_imitates_is_reported(shape: str) -> None:
    assert "many times slower" in planned(shape, gpu="t4", precision="bf16").notes[-1]
    assert not [note for note in planned(shape, gpu="a10", precision="bf16").notes if "slower" in note]


def test_precision_follows_the_gpu(shape: str) -> None:
    assert planned(shape, gpu="t4").precision == "fp16"
    assert planned(shape, gpu="l4").precision == "bf16"
    assert planned(shape, gpu="t4", precision="fp32").precision == "fp32"


def test_a_calibration_is_kept_by_the_driver_s_name_and_found_by_both(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    before = planned(shape, gpu="rtx-4090")
    measured = {"context": 321 * MIB, "workspace": 5 * MIB, "measured": "2026-01-02"}
    (tmp_path / device.CALIBRATIONS).write_text(json.dumps({"NVIDIA GeForce RTX 4090": measured}))
    made = planned(shape, gpu="rtx-4090")
    assert made.outside == {"CUDA context": 321 * MIB}
    assert made.needed < before.needed
    assert device.calibration("NVIDIA GeForce RTX 4090").measured == "2026-01-02"
    assert device.calibration("rtx-3090") == device.Calibration()
    (tmp_path / device.CALIBRATIONS).write_text("[")
    assert device.calibration("rtx-4090") == device.Calibration()


# ---- mistakes ----


def test_several_mistakes_are_reported_at_once(data_file: Path) -> None:
    """Paths and names first, before torch is imported; then what needs it."""
    wrong: dict[str, Any] = {"gpu": "rtx-4091", "method": "lroa", "optimizer": "adam"}
    paths: dict[str, Any] = {"data": ["none.jsonl", "neither.jsonl"], "eval_data": ["nor.jsonl"], "adapter": "nowhere"}
    with pytest.raises(Problems) as caught:
        fitune.plan("qwen2.5-0.5", template="alpacca", **paths, **wrong)
    text = str(caught.value)
    for part in (
        "6 problems", "none.jsonl: no such", "neither.jsonl: no such", "nor.jsonl: no such", "nowhere: no such",
        "unknown template", "qwen2.5-0.5: no", "of the catalog: qwen2.5-0.5b",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(Problems) as caught:
        fitune.plan("qwen2.5-0.5b", data=[data_file], **wrong)
    for part in ("3 problems", "--gpu 'rtx-4091'", "unknown method 'lroa'", "unknown optimizer 'adam'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, "greater than or equal to 2"),
        ({"max_length": -8}, "greater than or equal to 2"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"max_length": 513}, "max_length is above what the model can hold received: 513 expected: 512"),
        ({"max_length": "auto", "method": "prompt", "prompt": {"tokens": 512}}, "virtual tokens leave no room"),
        ({"method": "full", "quant": "nf4"}, "full does not go with quant nf4"),
        ({"quant": {"skip": ["q_proj"]}}, "settings of quant are given, but nothing is quantized"),
        ({"method": "full", "lora": {"rank": 3}}, "settings of lora are given, but the method is full"),
        ({"optimizer_in_backward": True}, "it is for full"),
        ({"precision": "fp32", "trainable_dtype": "bf16"}, "trainable_dtype bf16 with precision fp32"),
        ({"sede": 3}, "unknown setting 'sede'"),
        ({"tokenizer": "/no/such/folder"}, "/no/such/folder: no such folder"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str, shape: str) -> None:
    with pytest.raises(FituneError) as caught:
        planned(shape, **changes)
    assert message in text_of(caught.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["plan: of which model?"]),
        (["qwen2.5-0.5", "--gpu", "0GB"], ["of the catalog: qwen2.5-0.5b"]),
        (["qwen2.5-0.5b", "--gpu", "0GB", "--method", "lroa"], ["2 problems", "--gpu '0GB'", "unknown method 'lroa'"]),
        ([SMALL, "--data", "none.jsonl", "--method", "lora"], ["none.jsonl: no such file"]),
        ([SMALL, "--set", "gpu=24GB"], ["unknown setting 'gpu'"]),
        ([SMALL, "--set", "words=x", "--batch-size", "0"], ["2 problems", "'words'", "batch_size: wrong value"]),
        ([SMALL, "--force"], ["--force"]),
        ([SMALL, "--output", "run"], ["--output"]),
        ([SMALL, "--verify"], ["--verify: with which data?"]),
        ([SMALL, "--verify", "--data", BUNDLED_ROWS, "--gpu", "24GB"], ["--gpu would do nothing"]),
        ([SMALL, "--verify", "--calibrate"], ["one at a time"]),
        ([SMALL, "--verify", "--data", __file__], ["unknown kind of file"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], parts: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = command(["plan", *arguments], capsys, monkeypatch)
    assert code == 2
    assert err.count("error: ") == 1
    assert "Traceback" not in err + out
    for part in parts:
        assert part in err


def test_calibration_needs_a_gpu(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command(["plan", "--calibrate"], capsys, monkeypatch)
    assert (code, out) == (2, "")
    for part in ("no CUDA GPU here to calibrate", "725 MiB of context"):
        assert part in err


# ---- the rows ----


def test_rows_are_as_long_as_the_tokenizer_says(model_folder: Path, data_file: Path) -> None:
    made = planned(model_folder, data=[data_file], max_length="auto", batch_size=38)
    words = tokenizer.load(model_folder)
    assert made.notes == []
    assert made.rows == tiny.DATA_ROWS - 1  # all that are trained: one is held out
    counts = [len(words.apply_chat_template(row["messages"])["input_ids"]) for row in tiny.rows(tiny.DATA_ROWS)]
    assert 0 < sum(counts) - made.tokens <= 2 * max(counts)


def test_data_is_named_as_for_train(bare: Path, data_file: Path) -> None:
    forms = (str(data_file), data_file, [data_file], [str(data_file)], [{"path": str(data_file)}])
    made = [planned(bare, data=data, gpu=None, device="cpu", method="bitfit", bitfit={"add": True}) for data in forms]
    assert len({one.tokens for one in made}) == 1
    assert made[0].tokens != planned(bare, gpu=None, device="cpu").tokens


def test_without_a_tokenizer_lengths_are_estimated_and_that_is_reported(
    bare: Path, model_folder: Path, data_file: Path
) -> None:
    made = planned(bare, data=[data_file], max_length="auto")
    assert f"no tokenizer at hand (--tokenizer FOLDER): lengths of {tiny.DATA_ROWS} rows are estimated" in made.notes[0]
    known = planned(bare, data=[data_file], max_length="auto", tokenizer=model_folder)
    assert known.notes == []
    assert known.tokens == planned(model_folder, data=[data_file], max_length="auto").tokens
    assert known.tokens != made.tokens


def test_an_estimate_counts_all_that_a_row_says() -> None:
    def tokens(message: Message, **more: Any) -> int:
        return planned_rows._tokens(Conversation((message,), **more), 128_000)

    plain = tokens(Message("user", "word " * 100))
    assert tokens(Message("user", "word " * 100, context="word " * 100)) > 1.5 * plain
    called = Message("assistant", "word " * 100, tool_calls=(ToolCall("f", "word " * 100),))
    assert tokens(called) > 1.5 * plain
    tools = ({"type": "function", "function": {"name": "f", "description": "word " * 100}},)
    assert tokens(Message("user", "word " * 100), tools=tools) > 1.5 * plain
    assert (
        planned_rows._tokens(Conversation((Message("user", "汉字" * 100),)), 32_000) > 300
    )  # in few-token vocabularies
    assert planned_rows._tokens(Conversation((Message("user", "汉字" * 100),)), 128_000) < 200


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("alpaca_zh_demo.json", {}),
        ("alpaca_en_demo.json", {}),
        ("identity.json", {"fill": {"name": "小调", "author": "fitune"}}),
        ("glaive_toolcall_en_demo.json", {"template": "qwen"}),
    ],
)
def test_an_estimate_is_within_a_quarter_of_the_tokens(shared: Path, file: str, changes: dict[str, Any]) -> None:
    settings = {"max_length": 2048, "take": [60], "val_share": 0.0, **changes}
    asked = to_plan(SMALL, data=[str(shared / "data" / file)], gpu="24GB", settings=settings)
    guessed = planned_rows.rows_of(asked, None, Silent())
    real = planned_rows.rows_of(asked, shared / "tokenizers" / "qwen2", Silent())
    assert guessed.note
    assert not real.note
    guessed_sum, real_sum = (int(lengths_of(rows.samples).sum()) for rows in (guessed, real))
    assert guessed_sum == pytest.approx(real_sum, rel=0.25)


def test_held_out_rows_are_planned_where_there_are_some(bare: Path, data_file: Path) -> None:
    assert "evaluation" in {m.phase for m in planned(bare, data=[data_file]).phases}
    assert "evaluation" not in {m.phase for m in planned(bare, data=[data_file], val_share=0.0).phases}


def test_new_tokens_are_counted_with_and_without_a_tokenizer(model_folder: Path, bare: Path, data_file: Path) -> None:
    for folder in (model_folder, bare):
        plain = planned(folder, data=[data_file])
        more = planned(folder, data=[data_file], new_tokens=["<one>", "<two>"])
        assert more.trainable - plain.trainable == 2 * 2 * 32  # two rows of the embedding, two of the head


def test_a_prompt_in_words_needs_no_tokenizer_for_a_plan(shape: str, model_folder: Path) -> None:
    wanted = {"method": "prompt", "prompt": {"tokens": 8}}
    words = {"method": "prompt", "prompt": {"tokens": 8, "init": "text", "text": "the capital of Norland"}}
    assert planned(shape, **words).allocated == planned(shape, **wanted).allocated
    assert planned(model_folder, **words).trainable == 8 * 32


# ---- the steps that decide ----


def loader(lengths: list[int], batch_size: int, accumulation: int, **how: Any) -> Loader:
    rows = [Sample(np.zeros(n, np.int32), np.arange(n) > 0) for n in lengths]
    return Loader(rows, batch_size, accumulation, 0, **how)


def sizes(found: list[list[Any]]) -> list[list[int]]:
    return [[len(batch.ids) for batch in step] for step in found]


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_micro_batches_are_looked_at(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(2, 100, 48).tolist()
    made = loader(lengths, 2, 3)
    all_steps = [[sum(lengths[row] for row in rows) for rows in step] for step in made.epoch_steps(0)]
    short, best = sizes(steps.deciding(made, len(all_steps)))
    assert len(short) == 1
    assert short[0] <= all_steps[0][0]
    assert best[-1] == max(size for step in all_steps for size in step[1:])  # meets gradients
    assert max(best) == max(size for step in all_steps for size in step)
    assert len(sizes(steps.deciding(made, 1))) == 1


def test_padding_counts_where_there_is_some() -> None:
    made = loader([90, 2, 2, 2, 50, 50, 50, 50], 4, 1, by_length=True)
    made_steps = [[made.samples[row].mask.size for row in rows] for (rows,) in made.epoch_steps(0)]
    largest = max(made_steps, key=lambda rows: max(rows) * len(rows))
    assert sizes(steps.deciding(made, 2))[-1] == [sum(largest)]


# ---- what a plan says ----

METHODS = [*methods.TABLE, "peft:VERA"]


@pytest.fixture(scope="module")
def by_method(shape: str) -> dict[str, plans.Plan]:
    return {name: planned(shape, method=name) for name in METHODS}


def test_every_method_has_a_plan(by_method: dict[str, plans.Plan]) -> None:
    for name, made in by_method.items():
        assert made.how == "trace", name
        assert made.method == name
        assert 0 < made.trainable <= made.total
        assert made.peak.bytes == sum(made.peak.parts.values()) == max(m.bytes for m in made.phases)
        assert made.allocated >= made.peak.bytes
        assert made.allocated <= (made.smallest or 0) <= max(made.reserved or 0, made.reserved_expandable or 0)
        assert made.needed == (made.smallest or 0) + sum(made.outside.values())
        assert made.spare == 24 * GIB - made.needed
        assert made.fits is True
        assert {m.phase for m in made.phases} >= {"load", "forward", "loss", "backward", "update", "evaluation"}
    most = max(by_method, key=lambda name: by_method[name].peak.bytes)
    assert most == "full"
    order = ["full", "freeze", "lora", "bitfit"]
    assert sorted(order, key=lambda name: -by_method[name].trainable) == order
    assert by_method["full"].peak.bytes > by_method["lora"].peak.bytes > by_method["freeze"].phases[0].bytes
    assert by_method["full"].trainable == by_method["full"].total


def test_a_plan_is_the_same_twice(shape: str) -> None:
    assert planned(shape, lora={"dropout": 0.1}).as_dict() == planned(shape, lora={"dropout": 0.1}).as_dict()


@pytest.mark.parametrize("method", sorted(methods.TABLE))
def test_a_plan_leaves_the_shape_that_it_is_for(method: str, shape: str) -> None:
    """Many plans are made of one shape; new layers at the tail must not make it grow."""
    asked = to_plan(shape, data=(), gpu="24GB", settings={"method": method})
    before = asked.model_config.to_dict()
    plans.without_values(plans.Work(asked.config, asked.model_config, []))
    assert asked.model_config.to_dict() == before


COMPARED: dict[str, plans.Plan] = {}


def compared(shape: str, **changes: Any) -> plans.Plan:
    """Each plan once."""
    changes = {"batch_size": 4, "max_length": 128, **changes}
    key = json.dumps(changes)
    COMPARED[key] = COMPARED.get(key) or planned(shape, **changes)
    return COMPARED[key]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"quant": "nf4"}, {"quant": "int8"}),
        ({"quant": "int8"}, {}),
        pytest.param({"quant": "nf4"}, {"quant": {"name": "nf4", "double": False}}, marks=pytest.mark.full),
        ({"checkpointing": True}, {"checkpointing": 2}),
        ({"checkpointing": True}, {}),
        ({"batch_size": 1}, {"batch_size": 2}),
        pytest.param({"max_length": 32}, {"max_length": 64}, marks=pytest.mark.full),
        ({"precision": "bf16"}, {"precision": "fp32"}),
        pytest.param({"lora": {"rank": 2}}, {"lora": {"rank": 64}}, marks=pytest.mark.full),
        ({}, {"lora": {"dropout": 0.1}}),
        pytest.param({}, {"lora": {"targets": "all-linear"}}, marks=pytest.mark.full),
        ({"method": "full", "optimizer": "adamw-8bit"}, {"method": "full"}),
        pytest.param(
            {"method": "full", "optimizer": "adafactor"},
            {"method": "full", "optimizer": "lion"},
            marks=pytest.mark.full,
        ),
        pytest.param({"method": "full", "optimizer": "lion"}, {"method": "full"}, marks=pytest.mark.full),
        pytest.param({"method": "full", "trainable_dtype": "bf16"}, {"method": "full"}, marks=pytest.mark.full),
        pytest.param({"method": "freeze", "freeze": {"blocks": 1}}, {"method": "freeze"}, marks=pytest.mark.full),
        ({"accumulation": 1, "method": "full"}, {"accumulation": 2, "method": "full"}),  # the second meets gradients
    ],
    ids=str,
)
def test_what_takes_less_is_planned_to_take_less(less: dict[str, Any], more: dict[str, Any], shape: str) -> None:
    one, other = compared(shape, **less), compared(shape, **more)
    assert one.peak.bytes < other.peak.bytes
    assert one.allocated < other.allocated


def test_every_second_block_takes_less_where_not_all_others_are_the_last(tmp_path: Path) -> None:
    """Of two blocks the second is there in full when its gradients are made, recomputed or not."""
    path = tmp_path / "deeper.json"
    path.write_text(json.dumps({**SHAPE, "num_hidden_layers": 4}))
    every_second, none = (planned(str(path), batch_size=4, max_length=128, **how) for how in ({"checkpointing": 2}, {}))
    assert every_second.peak.bytes < none.peak.bytes
    assert every_second.allocated < none.allocated


QUICK = ("adamw", "adamw-8bit", "adafactor", "sgd")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in optim.TABLE]
)
def test_every_optimizer_has_the_states_of_its_table(name: str, shape: str) -> None:
    made = planned(shape, method="full", optimizer=name, max_length=8, gpu=None, device="cpu")
    states = next(m for m in made.phases if m.phase == "evaluation").parts.get("optimizer states", 0)
    assert states == pytest.approx(made.trainable * optim.TABLE[name].state_bytes, rel=0.1, abs=0.06 * made.trainable)
    assert made.closed.get("optimizer states", 0) == int(made.trainable * optim.TABLE[name].state_bytes)


def test_states_of_8_bits_are_that_in_every_dtype() -> None:
    def size(**changes: Any) -> float:
        return closed.state_bytes(build({"model": "m", "data": ["d"], **changes}))

    assert size() == 8
    assert size(trainable_dtype="bf16", precision="bf16") == 4
    assert size(optimizer="adamw-8bit") == size(optimizer="adamw-8bit", trainable_dtype="bf16") == 2.03


def test_a_checkpoint_takes_no_memory_of_a_gpu_and_copies_no_states_on_a_cpu(shape: str) -> None:
    on_gpu = planned(shape, method="full")
    on_cpu = planned(shape, method="full", gpu=None, device="cpu")
    assert "checkpoint" not in {m.phase for m in on_gpu.phases}
    states, copies = (next(m for m in on_cpu.phases if m.phase == "checkpoint").parts[name]
                      for name in ("optimizer states", "temporaries"))  # fmt: skip
    assert copies < states / 10  # what is small, and what tensors share


def test_closed_forms_stand_beside_and_agree(by_method: dict[str, plans.Plan]) -> None:
    made = by_method["lora"]
    assert sum(made.closed.values()) == pytest.approx(made.peak.bytes, rel=0.35)
    for name in ("frozen weights", "trainable weights"):
        assert made.closed[name] == pytest.approx(made.peak.parts[name], rel=0.01)


def test_what_cannot_be_traced_is_planned_by_closed_forms_and_reported(
    shape: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = planned(shape)

    def broken(*_: object) -> None:
        raise RuntimeError("an [/operation] that nobody knows")

    monkeypatch.setattr(plans, "shadows", broken)
    made = planned(shape)
    assert made.how == "closed form"
    assert "an [/operation] that nobody knows" in made.why
    assert made.notes[1].startswith("by closed forms, which may be a third off: this model cannot be traced")
    assert made.peak.bytes == sum(made.closed.values()) == sum(whole.closed.values())
    assert made.needed == made.peak.bytes + device.CONTEXT
    assert made.reserved is made.smallest is None
    page = tmp_path / "plan.html"
    arguments = ["plan", shape, "--gpu", "24GB", "--max-length", 64, "--html", page]
    code, out, err = command(arguments, capsys, monkeypatch)
    assert code == 0, err
    assert "by closed forms, which may be a third off" in " ".join(out.split())
    assert page.is_file()
    small = planned(shape, gpu="300MB")
    assert small.fits is False


# ---- the command ----


def test_json_is_one_object_equal_to_python_s(shape: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["plan", shape, "--gpu", "24GB", "--max-length", 64, "--batch-size", 2, "--quant", "nf4", "--json"]
    code, out, err = command([*arguments, "--set", "lora.rank=4"], capsys, monkeypatch)
    assert code == 0, err
    assert len(out.splitlines()) == 1
    wanted = planned(shape, quant="nf4", lora={"rank": 4}).as_dict()
    assert json.loads(out) == json.loads(json.dumps(wanted))
    assert "fits into 24.0 GiB" in " ".join(err.split())  # what people read stands beside, not inside


def test_the_verdict_and_its_note_are_printed(shape: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = command(["plan", shape, "--gpu", "900MB", "--max-length", 64], capsys, monkeypatch)
    assert (code, err) == (0, "")
    for part in ("no data given: every row has 64 tokens", "fits into 900.0 MiB with", "to spare", "frozen weights"):
        assert part in " ".join(out.split())


def test_a_page_is_written_and_never_over_another(
    shape: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "plan.html"
    arguments = ["plan", shape, "--gpu", "rtx-4090", "--max-length", 64, "--html", page]
    code, _, err = command(arguments, capsys, monkeypatch)
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    for part in ("<html", "small.json", "rtx-4090", "frozen weights"):
        assert part in text
    for part in ("http://", "https://", "<script src"):
        assert part not in text.replace("http://www.w3.org/2000/svg", "")
    code, _, err = command(arguments, capsys, monkeypatch)
    assert code == 2
    assert "nothing of yours is overwritten" in err
    assert page.read_text(encoding="utf-8") == text
    code, _, err = command([*arguments[:-1], tmp_path / "missing" / "plan.html"], capsys, monkeypatch)
    assert code == 2
    assert "no such folder" in err


# ---- predicted and measured ----


def test_the_proof_is_of_figures_that_others_measured(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = command(["plan", "--prove", "--json"], capsys, monkeypatch)
    assert code == 0, err
    found = json.loads(out)
    errors = [row["predicted_bytes"] / row["measured_bytes"] - 1 for row in found["table"]]
    assert len(errors) == found["rows"] > 20
    assert [row["error"] for row in found["table"]] == pytest.approx(errors)
    assert found["mean_error"] == pytest.approx(float(np.mean(np.abs(errors))))
    assert found["worst_error"] == pytest.approx(float(np.max(np.abs(errors))))
    assert found["mean_error"] < 0.025
    for row in found["table"]:
        assert row["name"] in err
    assert found["source"].split(",")[0] in err
    assert "One number was fitted" in err


@pytest.mark.parametrize(
    "changes",
    [{"method": "full"}, {"method": "full", "optimizer_in_backward": True, "max_grad_norm": 0.0}, {"quant": "nf4"}],
    ids=str,
)
def test_what_is_verified_agrees(changes: dict[str, Any], model_folder: Path, data_file: Path) -> None:
    values = {"model": str(model_folder), "data": [str(data_file)], "batch_size": 38, "device": "cpu", **changes}
    found = verify(build(values))
    assert found.allocated > MIB
    assert abs(found.error) <= 0.005, found.error
    assert found.predicted == max(row.predicted for row in found.phases)
    for row in [*found.rows, *found.phases]:
        assert row.predicted == pytest.approx(row.measured, rel=0.005, abs=4096), row
    assert {row.what for row in found.phases} >= {"load", "forward", "loss", "backward", "checkpoint"}


def test_verify_on_the_command_line(
    model_folder: Path, data_file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", model_folder, "--verify", "--data", data_file, "--device", "cpu", "--json"]
    code, out, err = command(arguments, capsys, monkeypatch)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert abs(found["error"]) <= 0.005
    assert "really allocated" in " ".join(err.split())
    assert not list(tmp_path.glob("runs/*"))


# ---- the plan before a run, and the rehearsal ----

RUN = {"batch_size": 8, "max_steps": 3, "sample_prompts": 0, "eval_every": 3, "device": "cpu"}


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "data": [str(data)], "output": str(output), **RUN, **changes}


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout."""
    folder = tmp_path_factory.mktemp("finished")
    data = tiny.write_rows(folder / "rows.jsonl", 40)
    train(build(settings(model_folder, data, folder / "run", lora={"dropout": 0.2})))
    return folder / "run"


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record.loss, record.grad_norm) for record in RunFolder(run).read_steps()]


def test_a_run_folder_has_the_plan_and_what_was_measured(finished: Path, model_folder: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    assert set(plan) >= set(planned(model_folder).as_dict())
    assert (plan["how"], plan["device"], plan["fits"]) == ("trace", "cpu", True)
    measured = json.loads((finished / "measured.json").read_text())
    assert measured["micro_batch_parts"] == 1
    moments = [moment for moment in plan["phases"] if moment["phase"] in ("forward", "loss", "backward")]
    largest = max(moments, key=lambda moment: moment["bytes"])
    for name in ("frozen weights", "trainable weights", "activations", "logits and loss"):
        assert measured["parts"][name] == pytest.approx(largest["parts"][name], rel=0.005), name
    assert measured["at_the_end"]["optimizer states"] == pytest.approx(largest["parts"]["optimizer states"], rel=0.01)
    result = json.loads((finished / "result.json").read_text())
    assert result["expected_memory_mib"] == plan["needed"] / MIB


def test_the_report_shows_predicted_beside_measured(finished: Path) -> None:
    measured = json.loads((finished / "measured.json").read_text())["parts"]
    report = " ".join((finished / "report.html").read_text(encoding="utf-8").split())
    for part in ("predicted, MiB", "measured, MiB"):
        assert part in report
    for name in ("frozen weights", "activations"):
        size = f"{measured[name] / MIB:.1f}"
        assert f'<td>{name}</td><td class="n">{size}</td><td class="n">{size}</td>' in report


def test_a_rehearsal_changes_nothing(
    finished: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "rehearse", lambda *_: Rehearsal({}, micro_batch_parts=1))
    data = finished.parent / "rows.jsonl"
    train(build(settings(model_folder, data, tmp_path / "run", lora={"dropout": 0.2})))
    assert json.loads((tmp_path / "run" / "measured.json").read_text())["parts"] == {}
    assert digest(tmp_path / "run") == digest(finished)
    assert losses(tmp_path / "run") == losses(finished)
    assert (tmp_path / "run" / "before.json").read_bytes() == (finished / "before.json").read_bytes()


def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a machine without free memory."""
    now = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now._replace(available=0))


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """Rows as long as the model can hold: with many at once their activations take a hundred MiB."""
    path = tmp_path / "long.jsonl"
    row = {"prompt": "what?", "completion": "two plus three is five " * 40}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(34)))
    return path


def test_what_cannot_fit_is_refused_before_any_weight_is_read(
    long_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save("llama", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    values = settings(model, long_rows, tmp_path / "run", batch_size=32)
    with pytest.raises(ModelError, match=r"model\.safetensors"):  # with enough memory the weights are the mistake
        train(build(values))
    little(monkeypatch)
    with pytest.raises(TrainingError) as caught:
        train(build(values))
    for part in ("the plan says that this does not fit: it misses by", "needed", "the peak is in", "--batch-size",
                 "--checkpointing", "--force"):  # fmt: skip
        assert part in text_of(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        train(build({**values, "force": True}))


def test_force_runs_it_anyway(
    model_folder: Path, long_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little(monkeypatch)
    values = settings(model_folder, long_rows, tmp_path / "run", batch_size=32, max_steps=1)
    done = train(build({**values, "force": True}))
    assert done.steps == 1
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["fits"] is False


def test_a_run_may_be_forced_to_go_on(finished: Path) -> None:
    assert not resume_config(str(finished), {}).force
    assert resume_config(str(finished), {"force": True}).force
    with pytest.raises(ConfigError, match="seed"):
        resume_config(str(finished), {"force": True, "seed": 1})


def limited(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the rehearsal on, training steps of a run cannot hold more than so many tokens; what was tried."""
    tried: list[int] = []
    real = train_start.rehearse

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            tried.append(output.shape[-2])
            if output.shape[-2] > tokens:
                raise OOM["cpu"]

    def rehearse(job: Any, runner: StepRunner) -> Rehearsal:
        names = dict(job.tuned.model.named_modules())
        next(m for n, m in names.items() if n.endswith("layers.1.mlp.up_proj")).register_forward_hook(hook)
        return real(job, runner)

    monkeypatch.setattr(training, "rehearse", rehearse)
    return tried


def test_a_rehearsal_that_does_not_fit_halves_micro_batches_to_the_same_result(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings(model_folder, data_file, tmp_path / "small", batch_size=2, accumulation=4)
    train(build(small))
    tried = limited(100, monkeypatch)
    watch = Messages()
    train(build(settings(model_folder, data_file, tmp_path / "large")), watch=watch)
    messages = [text for text in watch.messages if "memory" in text]
    assert messages[0].startswith("out of memory in a rehearsal of the largest step: micro-batches have at most 4 rows")
    assert not [text for text in messages if "the step is repeated" in text]  # so hours later nothing does not fit
    assert max(tried) > 100  # in the rehearsal alone:
    assert [size > 100 for size in tried].count(True) == len(messages)
    measured = json.loads((tmp_path / "large" / "measured.json").read_text())
    assert measured["micro_batch_parts"] == 2 ** len(messages)
    for (loss, norm), (other, their) in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert loss == pytest.approx(other, abs=1e-6)
        assert norm == pytest.approx(their, abs=1e-5)


def test_a_row_that_does_not_fit_is_named_and_leaves_nothing_behind(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(20, monkeypatch)
    values = settings(model_folder, data_file, tmp_path / "run")
    with pytest.raises(TrainingError) as caught:
        train(build(values))
    text = text_of(caught.value)
    assert f"one row alone does not fit into memory: {data_file}:" in text
    for part in ("tokens", "--max-length", "--checkpointing"):
        assert part in text
    assert "checkpoint is good" not in text  # there is none yet
    assert not (tmp_path / "run").exists()  # a second try must not find a folder in its way


def rehearsed(model: Any, batches: list[Any], messages: list[str] | None = None, state_bytes: int = 0) -> int:
    tracer, steps = trace.Tracer(), runner(model, messages=messages)
    with tracer:
        steps.rehearse(batches, state_bytes, tracer)
    return steps.parts


@pytest.mark.parametrize("kind", OOM)
def test_a_rehearsal_leaves_model_and_random_numbers_as_they_were(kind: str) -> None:
    model, _ = make(lora={"dropout": 0.3})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    failing: list[int] = []

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.shape[-2] > 20:
            failing.append(output.shape[-2])
            raise OOM[kind]

    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj")).register_forward_hook(hook)
    state, messages = torch.get_rng_state(), list[str]()
    assert rehearsed(model, [flat([s for s in samples() if len(s) > 1], range(4))], messages) == 2
    assert len(failing) == len(messages) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_rehearsal_lets_go_of_what_it_held_before_it_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the optimizer's states are held meanwhile: twice as many would not fit where once did."""
    held: list[weakref.ref] = []
    real = torch.empty

    def empty(*size: Any, **how: Any) -> torch.Tensor:
        made = real(*size, **how)
        if how.get("dtype") == torch.uint8:
            assert all(one() is None for one in held)
            held.append(weakref.ref(made))
        return made

    model, _ = make()
    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj")).register_forward_hook(
        lambda module, inputs, output: (_ for _ in ()).throw(OOM["gpu"]) if output.shape[-2] > 20 else None
    )
    monkeypatch.setattr(torch, "empty", empty)
    assert rehearsed(model, [flat([s for s in samples() if len(s) > 1], range(4))]) == 2
    assert len(held) == 2


def test_states_that_do_not_fit_are_reported_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*size: Any, **how: Any) -> torch.Tensor:
        raise OOM["gpu"]

    model, _ = make()
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(TrainingError) as caught:
        rehearsed(model, [flat(samples(), range(4))])
    assert "the optimizer's states do not fit into memory" in str(caught.value)
    assert "--optimizer adamw-8bit" in str(caught.value)
    assert "checkpoint is good" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model, _ = make()
    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj")).register_forward_hook(
        lambda module, inputs, output: (_ for _ in ()).throw(RuntimeError("size mismatch"))
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        rehearsed(model, [flat(samples(), range(4))])


def test_a_rehearsal_drops_gradients_where_the_optimizer_does(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    real = engine_step.make_gradients

    def counted(model: Any, *arguments: Any, **named: Any) -> Any:
        done = real(model, *arguments, **named)
        left.append(sum(parameter.grad is not None for parameter in trainable(model).values()))
        return done

    monkeypatch.setattr(step_runner, "make_gradients", counted)
    full = {"method": "full", "max_grad_norm": 0.0, "max_steps": 1}
    train(build(settings(model_folder, data_file, tmp_path / "kept", **full)))
    assert left[0] > 0
    left.clear()
    train(build(settings(model_folder, data_file, tmp_path / "dropped", **full, optimizer_in_backward=True)))
    assert left == [0, 0]


def test_a_resumed_run_takes_the_parts_of_its_rehearsal(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it has no checkpoint yet: the unbroken run had them from its first step."""
    values = settings(model_folder, data_file, tmp_path / "run", save_every=3)
    limited(100, monkeypatch)
    with pytest.raises(Crash):
        train(build(values), watch=CrashAt(2))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    parts = json.loads((tmp_path / "run" / "measured.json").read_text())["micro_batch_parts"]
    assert parts > 1
    used: list[int] = []
    real = StepRunner.step

    def step(self: StepRunner, *arguments: Any) -> Any:
        used.append(self.parts)
        return real(self, *arguments)

    monkeypatch.setattr(StepRunner, "step", step)
    monkeypatch.setattr(training, "rehearse", lambda *_: pytest.fail("rehearsed again"))
    train(resume_config(str(tmp_path / "run"), {}), resume=True)
    assert used == [parts] * 3


def test_help_of_plan_has_the_settings_of_train(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command(["plan", "--help-all"], capsys, monkeypatch)
    assert code == 0
    for flag in ("--method", "--quant", "--lora.rank", "--gpu", "--tokenizer", "--verify", "--calibrate", "--prove"):
        assert flag in out
    assert "--force" not in out
    assert sys.argv[:2] == ["fitune", "plan"]
