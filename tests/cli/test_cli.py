"""The command line as its user meets it: help, mistakes, JSON, pipes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fitune.cli import flags
from fitune.cli import help as helppage
from fitune.cli import main as cli
from fitune.core.config import RunConfig
from fitune.core.options import Options
from support import tiny
from support.command import run


@pytest.fixture
def mistakes(model_folder: Path, data_file: Path, tmp_path: Path) -> dict[str, tuple[list[object], list[str]]]:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 7}\n')
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    no_answer = tmp_path / "no_answer.json"
    no_answer.write_text('[{"instruction": "a", "output": ""}]')
    no_weights = tmp_path / "no_weights"
    tiny.save("llama", no_weights)
    (no_weights / "model.safetensors").unlink()
    pickled = tmp_path / "pickled"
    tiny.save("llama", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    m, d, o = ["--model", model_folder], ["--data", data_file], ["--output", tmp_path / "out"]
    return {
        "missing file": ([*m, "--data", "none.jsonl", *o], ["none.jsonl: no such file", "fix:"]),
        "malformed row": (
            [*m, "--data", bad, *o],
            [f"{bad}:2:completion: not a text", "received: 7", "expected: a string"],
        ),
        "empty data": ([*m, "--data", empty, *o], ["no rows"]),
        "no answer": ([*m, "--data", no_answer, *o], [":1:output: the answer is empty"]),
        "no weights": (["--model", no_weights, *d, *o], ["no weights", "expected: model.safetensors"]),
        "pickles": (["--model", pickled, *d, *o], ["pytorch_model.bin", "download the model again"]),
        "remote code": (["--model", remote, *d, *o], ["which fitune never runs"]),
        "no model": (["--model", "nowhere", *d, *o], ["nowhere: no such folder"]),
        "unknown method": ([*m, *d, *o, "--method", "lroa"], ["unknown method 'lroa'", "did you mean 'lora'?"]),
        "unknown flag": ([*m, *d, *o, "--bath-size", 3], ["--bath-size", "Did you mean --batch-size?"]),
        "unknown quantizer": ([*m, *d, *o, "--quant", "nf5"], ["--quant", "'nf4'", "received 'nf5'"]),
        "unknown setting": ([*m, *d, *o, "--set", "sede=3"], ["unknown setting 'sede'", "did you mean 'seed'?"]),
        "unknown template": ([*m, *d, *o, "--template", "alpacca"], ["did you mean 'alpaca'?"]),
        "wrong value": ([*m, *d, *o, "--batch-size", "many"], ["batch_size", "many"]),
        "not an integer": ([*m, *d, *o, "--set", "batch_size=many"], ["batch_size: wrong value", "received: 'many'"]),
        "bad target": ([*m, *d, *o, "--lora.targets", "qproj"], ["matches no linear layer", "did you mean 'q_proj'?"]),
        "too long": ([*m, *d, *o, "--max-length", 100000], ["above what the model can hold"]),
        "no device": ([*m, *d, *o, "--device", "tpu9"], ["device 'tpu9' cannot be used"]),
        "nothing given": ([], ["2 problems", "model is missing", "data is missing"]),
        "two at once": (["--model", "nowhere", "--data", "none", *o], ["2 problems", "none: no such file", "nowhere"]),
        "resume what": (["--resume"], ["which run?"]),
        "resume nothing": (["--resume", "--output", tmp_path / "nope"], ["not a run folder"]),
        "no config": (["--config", tmp_path / "no.yaml"], ["no such file"]),
    }


NAMES = [
    "missing file", "malformed row", "empty data", "no answer", "no weights", "pickles", "remote code", "no model",
    "unknown method", "unknown flag", "unknown quantizer", "unknown setting", "unknown template", "wrong value",
    "not an integer",
    "bad target", "too long", "no device", "nothing given", "two at once", "resume what", "resume nothing", "no config",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_message_and_exit_code_2(
    name: str,
    mistakes: dict[str, tuple[list[object], list[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, parts = mistakes[name]
    code, out, err = run(["train", *arguments], capsys, monkeypatch)
    assert code == 2
    assert out == "" or "error" not in out
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()  # a second try must not find a folder in its way


def test_every_mistake_is_tried(mistakes: dict[str, tuple[list[object], list[str]]]) -> None:
    assert sorted(mistakes) == sorted(NAMES)


@pytest.mark.parametrize(
    ("verb", "typed", "refused"),
    [
        ("train", ["--batch-size", "2.7"], True),
        ("train", ["--max-length", "512.5"], True),
        ("train", ["--lora.rank", "8.2"], True),
        ("train", ["--take", "1.5"], True),
        ("chat", ["--max-new-tokens", "3.5"], True),
        ("train", ["--batch-size", "2.0", "--epochs", "0.5", "--max-length", "auto", "--val-share", "0.25"], False),
    ],
)
def test_a_fraction_is_no_whole_number(
    verb: str, typed: list[str], refused: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser of the command line would round it."""
    more = ["none"] if verb == "chat" else ["--model", "none", "--data", "none.jsonl"]
    code, _, err = run([verb, *more, *typed], capsys, monkeypatch)
    assert code == 2
    assert ("expected: a whole number" in err) is refused, err
    assert (f"{typed[0]}: wrong value\n  received: {typed[1]}" in err) is refused


def test_help_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['fitune', '--help']\nfrom fitune.cli.main import main\nmain()\n"
    check = "\nassert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert "Fine-tune" in done.stdout


def flags_of(group: type[BaseModel]) -> set[str]:
    """The settings as they are typed."""
    flags = set()
    for name, info in group.model_fields.items():
        inner = type(info.default).model_fields if isinstance(info.default, Options) else {"": info}
        for field, one in inner.items():
            assert one.description
            flag = f"{name}.{field}" if field and (name, field) != ("quant", "name") else name
            flags.add(f"--{flag.replace('_', '-')}")
    return flags


def test_every_setting_is_a_flag_with_its_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(["train", "--help-all"], capsys, monkeypatch)
    assert code == 0
    shown = re.findall(r"^  (--[\w.-]+)", out, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert flags_of(RunConfig) <= set(shown)
    text = str(RunConfig.model_fields["lr"].description).split(".")[0]
    assert text in out  # config.py is the one source of the texts


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_help_is_a_screen_of_groups(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, short, _ = run([verb, "--help"], capsys, monkeypatch)
    _, long, _ = run([verb, "--help-all"], capsys, monkeypatch)
    for out in (short, long):
        assert max(map(len, out.splitlines())) <= 80
        titles = [line.strip().rstrip(":") for line in out.splitlines()[3:] if re.match(r"\w.*: *$", line)]
        assert titles == [title for title in helppage.GROUPS if title in titles]
        assert len(titles) >= 3
    options = re.findall(r"^  (--[\w.-]+|[A-Z]+)\b", short, re.MULTILINE)
    assert len(options) == len(helppage.FIRST[verb]) <= 15
    assert {helppage.field_of(option) for option in options} == set(helppage.FIRST[verb])
    assert len(short.splitlines()) <= 45
    rest = len(re.findall(r"^  (--[\w.-]+|[A-Z]+)\b", long, re.MULTILINE)) - len(options)
    assert f"{rest} more options: fitune {verb} --help-all" in short


def test_every_option_stands_in_one_group() -> None:
    fields = [field for group in helppage.GROUPS.values() for field in group]
    assert len(fields) == len(set(fields))
    missing = set(RunConfig.model_fields) - set(fields)
    assert not missing, f"put {sorted(missing)} into helppage.GROUPS"
    for verb in helppage.FIRST:
        arguments = cli.app[verb].assemble_argument_collection()
        names = {helppage.field_of(one.name).partition(".")[0] for one in arguments if one.show and one.name != "*"}
        assert names - {"flags"} <= set(fields), f"put {sorted(names - set(fields))} into helppage.GROUPS"


def test_an_option_without_a_group_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {title: tuple(f for f in fields if f != "epochs") for title, fields in helppage.GROUPS.items()}
    monkeypatch.setattr(helppage, "GROUPS", without)
    _, out, _ = run(["train", "--help-all"], capsys, monkeypatch)
    assert "--epochs" in out


def test_train_prints_one_json_object(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["train", "--model", model_folder, "--data", data_file, data_file, "--output", tmp_path / "run"]
    arguments += ["--max-steps", 2, "--set", "lora.rank=2", "--sample-prompts", 0, "--json"]
    code, out, err = run(arguments, capsys, monkeypatch)
    assert code == 0
    result = json.loads(out)
    for key in (
        "first_loss", "last_loss", "held_out_loss_before", "held_out_loss_after", "trainable_parameters",
        "total_parameters", "real_tokens_per_second", "peak_memory_mib", "run",
    ):  # fmt: skip
        assert key in result
    assert result["trainable_parameters"] == 3 * 2 * (32 + 48 + 32 + 24)  # 3 blocks, rank 2, q: 32 -> 48, v: 32 -> 24
    before, *_ = err[err.index("model      ") :].partition("step 1/")  # behind the progress of a library
    lines = before.splitlines()
    last = next(n for n, line in enumerate(lines) if line.startswith("run folder"))
    names = [line[:11].strip() for line in lines[: last + 1]]
    assert names[:6] == ["model", "data", "method", "steps", "memory", "checks"]
    assert set(names[6:-1]) <= {"warnings"} or set(names[6:-1]) <= {"warning", ""}  # a busy machine is worth one
    assert "checks passed" in before
    assert "\x1b" not in err
    assert all(len(line) <= 80 for line in lines[:last])

    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("你好\n"))
    code, out, _ = run(["chat", tmp_path / "run", "--max-new-tokens", 5], capsys, monkeypatch)
    assert code == 0
    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("hello\n/reset\nhello\n"))
    code, out, _ = run(
        ["chat", tmp_path / "run", "--max-new-tokens", 5, "--compare", "--system", "s"], capsys, monkeypatch
    )
    assert code == 0
    assert out.count("base") == 2
    assert "forgotten" in out


def test_verbose_prints_what_the_report_has(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["train", "--model", model_folder, "--data", data_file, data_file, "--output", tmp_path / "run"]
    code, out, _ = run([*arguments, "--max-steps", 1, "--sample-prompts", 0, "--verbose"], capsys, monkeypatch)
    assert code == 0
    read = f"{2 * tiny.DATA_ROWS} read ({2 * tiny.DATA_ROWS} messages)"
    for part in (read, "trainable of", "tokens trained", "<|end|>", "embedding", "float32"):
        assert part in out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for part in (read, "tokens trained", "&lt;|end|&gt;", "embedding", "float32"):
        assert part in page


def test_chat_refuses_what_makes_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, part in (
        ([tmp_path / "nothing"], "no such folder"),
        ([tmp_path, "--temperature", -1], "out of range"),
        ([tmp_path, "--temperature", "nan"], "out of range"),
        ([tmp_path, "--top-p", 0], "out of range"),
    ):
        code, _, err = run(["chat", *arguments], capsys, monkeypatch)
        assert code == 2
        assert part in err


def test_a_yaml_file_gives_settings_and_flags_win(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model_folder}\ndata: [{data_file}]\nmax_steps: 9\nlora: {{rank: 2, alpha: 4}}\n")
    arguments = [
        "train",
        "--config",
        config,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        "--lora.rank",
        3,
        "--json",
    ]
    code, out, _ = run(arguments, capsys, monkeypatch)
    assert code == 0
    assert json.loads(out)["steps"] == 1
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "rank: 3" in stored
    assert "alpha: 4" in stored


def test_sources_come_from_flags(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "a.csv"
    table.write_text("content,summary,id\n" + "".join(f"what is {n}?,I am {{{{name}}}},{n}\n" for n in range(30)))
    lines = tiny.write_rows(tmp_path / "E:\\d\\b.jsonl", 20)
    with lines.open("a") as file:
        file.write("{}\n")
    arguments = ["train", "--model", model_folder, "--data", table, lines, "--output", tmp_path / "run", "--json"]
    arguments += ["--map", "content=prompt", "--map", "summary=completion", "--fill", "name=A=B", "--skip-bad"]
    arguments += ["--take", 15, 10, "--weight", 2, "--max-steps", 1, "--lora.rank", 2, "--sample-prompts", 0]
    code, _, err = run(arguments, capsys, monkeypatch)
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "data.json").read_text())["report"]
    assert report["formats"] == {"prompt/completion": 15, "messages": 10}
    assert report["skipped"] == [f"{lines}:21: no known format"]
    assert report["unused_columns"] == {"id": 30}
    assert report["unfilled_slots"] == {}
    assert report["files"] == {str(table): 30, str(lines): 20}
    assert report["rows"] == 24 * 2 + 1
    stored = (tmp_path / "run" / "config.yaml").read_text()
    for part in ("content: prompt", "summary: completion", "name: A=B", "skip_bad: true"):
        assert part in stored
    resumed = [
        "train",
        "--resume",
        "--output",
        tmp_path / "run",
        "--take",
        15,
        10,
        "--map",
        "content=prompt",
        "--skip-bad",
    ]
    assert run(resumed, capsys, monkeypatch)[0] == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--map", "content"], ["--map", "received: 'content'", "expected: name=value, for example content=prompt"]),
        (["--fill", "=x"], ["--fill", "received: '=x'", "for example name=Ada"]),
        (["--format", "alpacca"], ["unknown format 'alpacca'", "did you mean 'alpaca'?"]),
        (["--format", "alpaca"], [":1:instruction: missing (a row of alpaca)"]),
        (["--map", "a=promt"], ["unknown field 'promt'", "did you mean 'prompt'?"]),
        (["--take", 1, 2, 3], ["take: wrong value", "received: [1, 2, 3]", "expected: one number"]),
        (["--take", 0], ["take[0]: wrong value"]),
    ],
)
def test_a_wrong_source_flag_says_why(
    flags: list[object],
    parts: list[str],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["train", "--model", model_folder, "--data", data_file, "--output", tmp_path / "out", *flags]
    code, _, err = run(arguments, capsys, monkeypatch)
    assert code == 2
    for part in parts:
        assert part in err


def test_ctrl_c_is_reported_in_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fitune.commands.plan.answer", interrupted)
    code, out, err = run(["plan", "llama-3.2-1b", "--method", "lora"], capsys, monkeypatch)
    assert (code, out, err) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        (["--lora.targets", "q_proj"], "q_proj"),
        (["--lora.targets", "q_proj", "--lora.targets", "v_proj"], ["q_proj", "v_proj"]),
        (["--lora.targets", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
    ids=str,
)
def test_every_target_that_is_typed_counts(words: list[str], targets: Any) -> None:
    _, bound, _ = cli.app.parse_args(["train", *words], exit_on_error=False, print_error=False)
    assert flags.typed(bound.arguments["flags"]) == {"lora": {"targets": targets}}


def test_an_option_that_is_needed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(["merge", "x"], capsys, monkeypatch)
    assert code == 2
    assert err.startswith("error: --output is needed")


def test_flags_that_were_put_together_once_hold_nothing_of_the_line_before() -> None:
    """Tests share them (support/flags.py): what was typed is no part of the next command line, nested or not."""
    words = ["train", "--model", "m", "--data", "d.jsonl", "--lora.rank", "4", "--set", "seed=1"]
    first = cli.app.parse_args(words)[1]
    assert (first.arguments["flags"].lora.rank, first.arguments["set_"]) == (4, ["seed=1"])
    second = cli.app.parse_args(["train", "--model", "other"])[1]
    assert second.arguments["flags"].model_dump(exclude_none=True) == {"model": "other"}
    assert "set_" not in second.arguments
    assert cli.app.parse_args(words)[1] == first
