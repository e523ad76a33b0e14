"""What a newcomer types first: names of other tools, wrong paths, GPUs by their short names, homes, finished runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.checks import early
from fitune.cli import main as cli
from fitune.cli.flags import typed
from fitune.core import names
from fitune.core.config import RunConfig, build, merge, parse_assignments, read_yaml
from fitune.core.errors import ConfigError, FituneError, Problems, RunFolderError, did_you_mean
from fitune.core.files import as_json, names_near, with_own_sum, write_json
from fitune.core.options import Options
from fitune.memory.device import find, gpus
from support import tiny
from support.command import run

ROWS = {"model": "m", "data": ["d"]}


# ---- names of others ----


def test_no_name_of_another_tool_is_one_of_ours() -> None:
    for table in (names.SAME, names.MEANS, names.INSTEAD):
        assert not set(table) & set(RunConfig.model_fields)
    assert not set(names.SAME) & (set(names.MEANS) | set(names.INSTEAD))
    assert set(names.MEANS) <= set(names.INSTEAD)  # a value that is not known needs something to type
    for ours in {*names.SAME.values(), *names.VALUES}:
        group, _, inner = ours.partition(".")
        default = RunConfig.model_fields[group].default
        assert not inner or (isinstance(default, Options) and inner in type(default).model_fields), ours


def test_what_is_to_be_typed_instead_is_there() -> None:
    import re

    from fitune.cli import main as cli

    flags = {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields} | {"--resume", "--gpus"}
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.default, Options):
            flags |= {f"--{name}.{one}".replace("_", "-") for one in type(info.default).model_fields}
    for text in names.INSTEAD.values():
        assert set(re.findall(r"--[a-z][a-z.-]*", text)) <= flags, text
        verb = re.match(r"fitune (\w+)", text)
        assert verb is None or verb[1] in cli.app


LLAMA_FACTORY = {
    "model_name_or_path": "m", "trust_remote_code": False, "stage": "sft", "do_train": True, "finetuning_type": "lora",
    "lora_rank": 16, "lora_alpha": 32, "lora_target": "all", "dataset": "a.json,b.json", "cutoff_len": 2048,
    "output_dir": "runs/x", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "quantization_bit": 4,
    "eval_steps": 500, "overwrite_output_dir": False,
}  # fmt: skip
AXOLOTL = {
    "base_model": "m", "load_in_8bit": False, "load_in_4bit": True, "sequence_len": 2048, "lora_r": 16,
    "lora_alpha": 32, "lora_target_linear": True, "datasets": ["a.json", "b.json"], "output_dir": "runs/x",
    "micro_batch_size": 1, "gradient_accumulation_steps": 8, "num_epochs": 3, "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine", "learning_rate": 1e-4, "train_on_inputs": False, "bf16": True, "fp16": False,
    "sample_packing": False, "gradient_checkpointing": True, "warmup_ratio": 0.1,
}  # fmt: skip


def test_a_config_of_another_tool_is_the_same_run(tmp_path: Path) -> None:
    ours = {
        "model": "m", "data": ["a.json", "b.json"], "output": "runs/x", "batch_size": 1, "accumulation": 8, "lr": 1e-4,
        "epochs": 3, "warmup": 0.1, "precision": "bf16", "quant": "nf4", "max_length": 2048,
        "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"},
    }  # fmt: skip
    assert build(LLAMA_FACTORY) == build({**ours, "method": "lora", "eval_every": 500})
    assert build(AXOLOTL) == build({**ours, "optimizer": "adamw-8bit", "checkpointing": True})
    (tmp_path / "run.yaml").write_text(json.dumps(LLAMA_FACTORY))
    assert build(merge(read_yaml(tmp_path / "run.yaml"), {"lr": 5e-5})).lr == 5e-5  # a flag wins, whatever the name
    assert parse_assignments(["learning_rate=1e-4", "lora-r=4"]) == {"lr": 1e-4, "lora": {"rank": 4}}


def test_names_inside_groups_and_values_of_others() -> None:
    config = build({**ROWS, "lora": {"r": 4, "target_modules": ["q_proj"], "use_dora": True}, "method": "qlora"})
    assert (config.lora.rank, config.lora.targets, config.lora.dora) == (4, ["q_proj"], True)
    assert (config.method, config.quant.name) == ("lora", "nf4")
    assert build({**ROWS, "method": "prefix_tuning"}).method == "prefix"
    assert build({**ROWS, "optim": "adamw_torch"}).optimizer == "adamw"
    assert build({**ROWS, "torch_dtype": "bfloat16"}).precision == build({**ROWS, "precision": "bfloat16"}).precision
    assert build({**ROWS, "batch-size": 3}).batch_size == 3
    assert build({**ROWS, "method": "peft:LOHA", "peft": {"r": 3}}).peft == {"r": 3}  # PEFT's own names stay


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"logging_steps": 10}, "leave it out: every step is logged"),
        ({"warmup_steps": 100}, "--warmup, a share of all steps"),
        ({"lr_scheduler_type": "linear"}, "received: 'linear'"),
        ({"bf16": False}, "--precision bf16, fp16, fp32 or auto"),
        ({"learning_rate": 1, "lr": 2}, "learning_rate: another name of lr, which is given too"),
        ({"lora": {"r": 1, "rank": 2}}, "lora.r: another name of lora.rank"),
    ],
)
def test_what_means_something_else_says_what_to_type(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({**ROWS, **values})
    assert part in str(caught.value)


def test_all_names_of_others_are_reported_at_once() -> None:
    with pytest.raises(Problems) as caught:
        names.flags(["--logging_steps", "10", "--report-to", "comet", "--lr", "1", "--warmup-steps=3"], "train")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--learning-rate 1e-4", {"lr": 1e-4}),
        ("--learning_rate=1e-4", {"lr": 1e-4}),
        ("--finetuning_type lora", {"method": "lora"}),
        ("--finetuning_type=qlora", {"method": "lora", "quant": {"name": "nf4"}}),
        ("--num_train_epochs 2 --per_device_train_batch_size 4", {"epochs": 2.0, "batch_size": 4}),
        ("--gradient-accumulation-steps 2 --cutoff_len 64", {"accumulation": 2, "max_length": 64}),
        ("--lora_rank 4 --lora-alpha 8", {"lora": {"rank": 4, "alpha": 8.0}}),
        ("--lora_target q_proj,v_proj", {"lora": {"targets": ["q_proj", "v_proj"]}}),
        ("--lora_target all", {"lora": {"targets": "all-linear"}}),
        ("--model_name_or_path m --dataset a,b --output_dir o", {"model": "m", "data": ["a", "b"], "output": "o"}),
        ("--bf16 --load_in_4bit", {"precision": "bf16", "quant": {"name": "nf4"}}),
        ("--fp16 true", {"precision": "fp16"}),
        ("--quantization_bit 8", {"quant": {"name": "int8"}}),
        ("--gradient_checkpointing True --use_dora", {"checkpointing": True, "lora": {"dora": True}}),
        ("--warmup_ratio 0.1 --lr_scheduler_type cosine --max_seq_length 32", {"warmup": 0.1, "max_length": 32}),
        ("--precision bfloat16 --quant 4bit", {"precision": "bf16", "quant": {"name": "nf4"}}),
        ("--batch_size 3 --max-grad-norm 2", {"batch_size": 3, "max_grad_norm": 2.0}),
    ],
)
def test_flags_of_others(words: str, settings: dict[str, Any]) -> None:
    from fitune.cli import main as cli

    _, bound, _ = cli.app.parse_args(
        ["train", *names.flags(words.split(), "train")], exit_on_error=False, print_error=False
    )
    assert typed(bound.arguments["flags"]) == settings


def test_a_name_that_nobody_has_gets_three_and_not_sixty() -> None:
    with pytest.raises(ConfigError, match="the nearest of") as caught:
        build({**ROWS, "zzz": 1})
    assert str(caught.value).count(",") == 2
    assert did_you_mean("x", ["lora", "full"]) == "choose one of: full, lora"


# ---- paths ----


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data, a config and a run in it, where one stands."""
    for name in ("llama-small", "llama-large"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text('{"model_type": "llama"}')
    tiny.write_rows(tmp_path / "train.jsonl", 3)
    (tmp_path / "mine.yaml").write_text("user: '{content}'\n")
    (tmp_path / "runs" / "mine" / "tokenizer").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("model: m\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


WRONG = {
    "model": ("train --model models/lama-small --data train.jsonl", ["nearest in models: llama-small, llama-large"]),
    "catalog": ("train --model qwen3 --data train.jsonl", ["of the catalog: qwen3-4b, qwen3-8b, qwen3-14b"]),
    "hub id": ("train --model Qwen/Qwen3-0.6 --data train.jsonl", ["of the catalog: Qwen/Qwen3-0.6B"]),
    "folder of models": ("train --model models --data train.jsonl", ["no config.json", "models/llama-large"]),
    "data": ("train --model models/llama-small --data trian.jsonl", ["trian.jsonl: no such file", "train.jsonl"]),
    "eval data": ("train --model models/llama-small --data train.jsonl --eval-data t.jsonl", ["t.jsonl: no such"]),
    "config": ("train --config min.yaml", ["min.yaml: no such file", "mine.yaml"]),
    "template": ("train --model models/llama-small --data train.jsonl --template my.yaml", ["my.yaml", "mine.yaml"]),
    "no template": ("train --model models/llama-small --data train.jsonl --template alpca", ["did you mean 'alpaca'"]),
    "adapter": ("train --model models/llama-small --data train.jsonl --adapter runs/min", ["runs/min", "mine"]),
    "no adapter": (
        "train --model models/llama-small --data train.jsonl --adapter runs/mine", ["no adapter here", "has not ended"]
    ),
    "run as a model": ("train --model runs/mine --data train.jsonl", ["no config.json", "a run that has not ended"]),
    "export of a run": ("export runs/mine --output out", ["no config.json", "a run that has not ended"]),
    "tokenizer of a run": ("inspect train.jsonl --model runs/mine", ["no tokenizer files", "runs/mine/tokenizer"]),
    "output": ("train --model models/llama-small --data train.jsonl --output mine.yaml/x", ["cannot be written"]),
    "full output": ("train --model models/llama-small --data train.jsonl --output runs", ["is not empty"]),
    "two": ("train --model no/where/x --data n.jsonl --output train.jsonl/o --lr -1", ["4 problems", "lr: wrong"]),
    "resume": ("train --resume --output runs/mnie", ["not a run folder", "nearest in runs: mine"]),
    "chat": ("chat mine", ["mine: no such folder", "runs: runs/mine"]),
    "eval": ("eval runs/mien --data trian.jsonl", ["2 problems", "nearest in runs: mine", "train.jsonl"]),
    "merge": ("merge runs/mien --output mine.yaml/x", ["2 problems", "not a run folder", "cannot be written"]),
    "export": ("export models/llama --output runs", ["2 problems", "nearest in models: llama-", "is not empty"]),
    "inspect": ("inspect trian.jsonl --model models/llama", ["2 problems", "train.jsonl", "llama-small"]),
    "plan": ("plan lama-3.1-8b --data trian.jsonl", ["2 problems", "of the catalog: llama-3.1-8b", "train.jsonl"]),
    "moved base": ("chat runs/mine --model models/llma-small", ["nearest in models: llama-small"]),
    "methods": ("methods --model models/lama", ["nearest in models: llama-"]),
    "home": ("train --model ~/nowhere/x --data ~/n.jsonl", ["2 problems", f"{Path.home()}"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path_is_reported_with_the_nearest_names(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, parts = WRONG[name]
    before = sorted(place.rglob("*"))
    code, out, err = run(words.split(), capsys, monkeypatch)
    assert (code, out) == (2, "")
    for part in parts:
        assert part in err, err
    assert sorted(place.rglob("*")) == before


def test_wrong_paths_are_reported_before_torch(place: Path) -> None:
    """Each kind of command in one process that has no torch to import."""
    chosen = [words.split() for words, _ in WRONG.values()]
    code = (
        "import sys, json\nsys.modules['torch'] = None\nfrom fitune.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['fitune', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert end.code == 2, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(chosen)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(chosen)


def test_names_near(tmp_path: Path) -> None:
    for name in ("alpha", "beta", "gamma", "delta", ".hidden"):
        (tmp_path / name).mkdir()
    assert names_near(tmp_path / "alpha") is None
    assert names_near(tmp_path / "alpah") == f"nearest in {tmp_path}: alpha, gamma, beta"
    assert str(names_near(tmp_path / "beat" / "x.json")).startswith(f"there is no folder {tmp_path / 'beat'}; nearest")
    assert names_near(tmp_path / "alpha" / "x") == f"nothing like it in {tmp_path / 'alpha'}"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot be written"):
        early.new_folder(tmp_path / "run")


def test_home_is_expanded_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    given = {
        "model": "~/m", "data": ["~/d", {"path": "~/e"}], "eval_data": Path("~/f"), "output": "~/o", "adapter": "~/a",
        "template": "~/t.yaml", "cache": "~/c",
    }  # fmt: skip
    config = build(given)
    assert [config.model, config.output, config.adapter, config.template, config.cache, *config.eval_data] == [
        str(tmp_path / name) for name in ("m", "o", "a", "t.yaml", "c", "f")
    ]
    assert [source.path for source in config.sources()] == [str(tmp_path / name) for name in "de"]


# ---- GPUs, finished runs, JSON, completion ----


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "rtx-4090"), ("3090", "rtx-3090"), ("rtx4090", "rtx-4090"), ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("rtx_3080", "rtx-3080"), ("A100 80G", "a100-80gb"),
        ("a100-40gb", "a100-40gb"), ("h100", "h100-80gb"), ("A6000", "rtx-a6000"), ("4060ti 16g", "rtx-4060-ti-16gb"),
        ("24g", "24g"), ("24 GB", "24 GB"),
    ],
)  # fmt: skip
def test_gpus_by_the_names_that_people_type(text: str, name: str) -> None:
    assert find(text).name == name
    assert text.lower().startswith("24") == (name not in gpus())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a100", "received: a100-40gb, a100-80gb"),
        ("4060ti", "received: rtx-4060-ti-8gb, rtx-4060-ti-16gb"),
        ("v100", "v100-16gb, v100-32gb"),
        ("24", "24GB, if that is its size"),
        ("24.5", "24.5GB, if that is its size"),
        ("0", "fix:      --device cuda:0 without --gpu, if that is its number"),
        ("1", "1GB, if that is its size; --device cuda:1"),
        ("0GB", "a size above 0"),
        ("-24GB", "a size above 0"),
        ("rtx-4900", "did you mean"),
    ],
)
def test_a_gpu_that_may_be_several_is_named(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(text)
    assert part in str(caught.value)


def test_the_number_of_a_gpu_and_standard_input_are_named_for_what_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, parts in (
        (["train", "--model", "m", "--data", "d", "--gpu", "0"], ("received: --gpu 0", "--device cuda:0")),
        (["train", "--model", "m", "--data", "-"], ("standard input", "received: -", "> rows.jsonl")),
        (["inspect", "-"], ("standard input", "received: -", "> rows.jsonl")),
        (["eval", "m", "--data=-"], ("standard input", "received: -", "> rows.jsonl")),
    ):
        code, _, err = run(arguments, capsys, monkeypatch)
        assert code == 2
        assert all(part in err for part in parts), err


def test_one_run_is_never_two(tmp_path: Path) -> None:
    """By another spelling, a link, or a copy, which has the identity of its run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    early.distinct([tmp_path / "run", tmp_path / "other"])
    for again in (tmp_path / "run", f"{tmp_path}/other/../run/", tmp_path / "link"):
        with pytest.raises(ConfigError, match="once more\n  received: one run twice"):
            early.distinct([tmp_path / "run", tmp_path / "other", again])
    for name in ("run", "copy"):
        (tmp_path / name).mkdir(exist_ok=True)
        write_json(tmp_path / name / "seal.json", with_own_sum({"identity": {"id": "a1"}}))
    with pytest.raises(ConfigError, match=r"copy: the run .*run once more"):
        early.distinct([tmp_path / "run", tmp_path / "copy"])


def test_every_gpu_is_found_by_its_own_names() -> None:
    for gpu in gpus().values():
        assert find(gpu.name).name == gpu.name
        assert find(gpu.device).name == gpu.name


def test_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    from fitune.commands.train import resume_config
    from fitune.engine.checkpoint import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_config(build({**ROWS, "output": str(folder.path), "max_steps": 20}))
    folder.write("result", {})
    with pytest.raises(ConfigError) as caught:
        resume_config(str(folder.path), names.ours({"max-steps": 25}))
    assert "max_steps 25 (the run has 20)" in str(caught.value)
    assert f"fitune train --adapter {folder.path} --output NEW" in str(caught.value)
    assert resume_config(str(folder.path), {"max_steps": 20}).max_steps == 20


def test_json_has_no_word_for_what_is_not_finite() -> None:
    value = {"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}, "d": (1, None)}
    assert json.loads(as_json(value), parse_constant=pytest.fail) == {
        "a": [None, None, 1.5], "b": {"c": None}, "d": [1, None],
    }  # fmt: skip


def test_completion_can_be_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    code, out, _ = run(["--install-completion", "--shell", "bash"], capsys, monkeypatch)
    assert code == 0
    assert str(tmp_path) in out
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "fitune" in path.read_text()]
    assert written
    assert any("--batch-size" in path.read_text() for path in written)


def test_errors_are_ours(place: Path) -> None:
    for check, value in (
        (early.model, "x/y/z"), (early.run, "runs/x"), (early.adapter, "x"), (early.data, "x.json"),
        (early.template, "x.yml"), (early.new_folder, "runs"),
    ):  # fmt: skip
        with pytest.raises(FituneError):
            check(value)


def test_an_option_of_a_verb_is_never_taken_for_another_tools() -> None:
    """`merge --dtype bf16` is merge's own, though `dtype` is a precision in Trainer."""
    verbs = [verb for verb in cli.app if not verb.startswith("-")]
    assert "merge" in verbs
    for verb in verbs:
        own = cli.own_options(verb)
        for name in own:
            words = [verb, f"--{name.replace('_', '-')}", "x"]
            assert names.flags(words, verb, own) == words or name in names.VALUES, words
    assert names.flags(["merge", "--dtype", "bf16"], "merge", cli.own_options("merge")) == ["merge", "--dtype", "bf16"]
    assert names.flags(["train", "--dtype", "bf16"], "train", cli.own_options("train"))[1] == "--precision"
