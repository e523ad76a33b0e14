"""Weights in: `.bin` files read without unpickling, hostile ones refused, folders whole or refused."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fitune
from fitune.checks import early
from fitune.commands.convert import convert
from fitune.core.errors import ModelError
from fitune.models import weights
from fitune.models.load import load_model
from fitune.models.weights import safe
from fitune.models.weights.bins import Bin
from support import tiny
from support.contract import logits

IDS = torch.arange(5, 30)[None]


def state() -> dict[str, torch.Tensor]:
    """Shared storages, strides, dtypes, an empty tensor, a number, a parameter."""
    base = torch.arange(60, dtype=torch.float32).view(6, 10)
    return collections.OrderedDict(
        whole=base, rows=base[2:4], column=base[:, 3], turned=base.T, again=base, step=base[::2, ::3],
        bf16=torch.randn(3, 5).bfloat16(), fp16=torch.randn(4).half(), fp64=torch.randn(2).double(),
        long=torch.arange(4), byte=torch.arange(5, dtype=torch.uint8), flag=torch.tensor([True, False, True]),
        empty=torch.empty(0, 3), one=torch.tensor(3.5), parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch_itself(protocol: int, tmp_path: Path) -> None:
    saved = state()
    torch.save(saved, tmp_path / "a.bin", pickle_protocol=protocol)
    # torch's own safe loader reads protocols 2 and 3 only
    theirs = torch.load(tmp_path / "a.bin", weights_only=True) if protocol < 4 else saved
    mine = Bin(tmp_path / "a.bin")
    assert mine.keys() == list(theirs)
    for name, tensor in theirs.items():
        found = mine.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor.detach()), name


def test_a_modules_own_state_dict_and_wrapped_ones(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    own = module.state_dict()
    for number, what in enumerate((own, {"state_dict": own}, dict(own))):
        torch.save(what, tmp_path / f"{number}.bin")
        assert Bin(tmp_path / f"{number}.bin").keys() == list(module.state_dict())


def test_a_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.bin")
    before = (tmp_path / "a.bin").read_bytes()
    Bin(tmp_path / "a.bin").tensor("a").add_(1)
    assert (tmp_path / "a.bin").read_bytes() == before


# ---- hostile files ----


class Run:
    """Unpickled, it would leave a trace."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def packed(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **how: Any) -> Path:
    """A zip of torch's form around a pickle."""
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, content in (storages or {"0": bytes(40)}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def reduced(module: str, name: str, arguments: bytes = b")") -> bytes:
    """{"a": module.name(*arguments)} in opcodes."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + arguments + b"Rs."


def tensor(
    *, storage: str = "FloatStorage", key: str = "0", count: int = 10, offset: int = 0, size: tuple = (10,),
    stride: tuple = (1,), kind: str = "storage",
) -> bytes:  # fmt: skip
    """{"a": a tensor} with everything as given."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def several(values: tuple) -> bytes:
        return b"(" + b"".join(number(v) for v in values) + b"t"

    persistent = b"(" + text(kind) + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + number(offset) + several(size) + several(stride)
    return b"\x80\x02}" + text("a") + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


CALLS = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "getattr"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("runpy", "run_path"), ("importlib", "import_module"),
    ("pickle", "loads"), ("_pickle", "loads"), ("torch", "load"), ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch.jit", "load"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "load"), ("operator", "attrgetter"),
    ("functools", "partial"), ("collections", "defaultdict"), ("webbrowser", "open"), ("shutil", "rmtree"),
    ("socket", "create_connection"), ("ctypes", "CDLL"), ("code", "interact"), ("timeit", "timeit"),
    ("torch", "FloatStorage.__class__"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
]  # fmt: skip


def hostile(place: Path) -> dict[str, Path]:
    """Files that each try one thing; `trace` is what they would leave."""
    trace = place / "trace"
    made = {f"{m}.{n}": packed(place / f"call-{i}.bin", reduced(m, n)) for i, (m, n) in enumerate(CALLS)}

    def keep(name: str, data: bytes, storages: dict[str, bytes] | None = None, **how: Any) -> None:
        made[name] = packed(place / f"{len(made)}.bin", data, storages, **how)

    touch = Run(os.system, f"touch {trace}")
    keep("a real exploit", pickle.dumps({"a": touch}, 2))
    keep("a real exploit, protocol 4", pickle.dumps({"a": touch}, 4))
    keep("nested pickle", pickle.dumps({"a": Run(pickle.loads, pickle.dumps(touch))}, 2))
    keep("eval", pickle.dumps([Run(eval, f"open({str(trace)!r}, 'w')")], 2))
    keep("names from the memo", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x02id\x85R.")
    keep("memo that is not there", b"\x80\x02}h\x63.")
    keep("an instance", b"\x80\x02(i__main__\nRun\n.")
    keep("an object", b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00ido.")
    keep("newobj", b"\x80\x02cbuiltins\nobject\n)\x81.")
    keep("an extension", b"\x80\x02\x82\x01.")
    keep("attributes set", b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__K\x01sb.")
    keep("a bomb of tuples", b"\x80\x02)" + b"q\x00h\x00\x86" * 5000 + b"K\x01\x86}h\x00K\x01s.")
    keep("a tuple of tuples for a key", b"\x80\x02}(" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01u.")
    keep("deep lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    keep("no end", b"\x80\x02}")
    keep("rubbish", b"\xff\xfe\x00rubbish")
    keep("nothing", b"")
    keep("a number", b"\x80\x02K\x01.")
    keep("empty", b"\x80\x02}.")
    keep("a text for a tensor", pickle.dumps({"a": "b"}, 2))
    keep("storage not there", tensor(key="7"))
    keep("storage outside", tensor(key="../../etc/passwd"))
    keep("another persistent id", tensor(kind="module"))
    keep("a storage of functions", tensor(storage="UntypedStorage"))
    keep("too long", tensor(size=(11,)))
    keep("a stride too far", tensor(size=(5, 2), stride=(4, 1)))
    keep("an offset too far", tensor(offset=5))
    keep("a negative size", tensor(size=(-1,)))
    keep("a negative stride", tensor(stride=(-1,)))
    keep("a negative offset", tensor(offset=-4))
    keep("a huge size", tensor(size=(2**62,)))
    keep("sizes without strides", tensor(size=(2, 5)))
    keep("a storage of another size", tensor(count=2**40, size=(2**40,)))
    keep("a wrong dtype", tensor(storage="DoubleStorage"))
    keep("a zip bomb", tensor(), {"0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    other = place / "paths.bin"
    with zipfile.ZipFile(packed(other, tensor()), "a") as archive:
        archive.writestr("../../evil", b"x")
    made["path traversal"] = other
    twice = place / "twice.bin"
    packed(twice, tensor())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("archive/data/0", bytes(40))
    made["an entry twice"] = twice
    big = place / "big.bin"
    with zipfile.ZipFile(big, "w") as archive:
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/byteorder", b"big")
        archive.writestr("archive/data/0", bytes(40))
    made["big-endian"] = big
    two = place / "two.bin"
    with zipfile.ZipFile(packed(two, tensor()), "a") as archive:
        archive.writestr("other/data.pkl", tensor())
    made["two pickles"] = two
    good = packed(place / "good.bin", tensor()).read_bytes()
    (place / "short.bin").write_bytes(good[: len(good) // 2])
    made["cut off"] = place / "short.bin"
    (place / "plain.bin").write_bytes(pickle.dumps({"a": touch}))
    made["a bare pickle"] = place / "plain.bin"
    old = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    (place / "old.bin").write_bytes(old.getvalue())
    made["torch's old format"] = place / "old.bin"
    return made


def read_all(file: Path) -> list[torch.Tensor]:
    opened = Bin(file)
    return [opened.tensor(key) for key in opened.keys()]  # noqa: SIM118


def test_hostile_files_are_refused_in_one_line_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hostile(tmp_path)
    assert len(files) >= 70
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *a: pytest.fail("something ran"))
    for name, file in files.items():
        with pytest.raises(ModelError) as error:
            read_all(file)
        assert "\n" not in error.value.what, name
        assert len(error.value.what) < 300, name
        assert file.name in error.value.what
    for module, name in CALLS:
        with pytest.raises(ModelError, match=f"its pickle names '{module}.{name}"):
            Bin(files[f"{module}.{name}"])
    assert not (tmp_path / "trace").exists()
    assert Bin(packed(tmp_path / "fine.bin", tensor())).keys() == ["a"]  # the frame around all of them is a good one


# ---- folders ----


@pytest.fixture(scope="module", params=["llama", "bloom", "gpt2", "llama-tied"])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in safetensors, and the same as torch's old files."""
    place = tmp_path_factory.mktemp(request.param)
    new = tiny.save(request.param, place / "new")
    return new, as_bins(new, place / "old", tiny.make_model(request.param).state_dict(), shards=1)


def as_bins(new: Path, folder: Path, tensors: dict[str, torch.Tensor], *, shards: int) -> Path:
    folder.mkdir()
    for path in new.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, folder / weights.BIN)
        return folder
    where = {name: f"pytorch_model-{1 + n % shards:05}-of-{shards:05}.bin" for n, name in enumerate(names)}
    for shard in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    (folder / weights.BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_old_folders_load_quantize_and_convert(old: tuple[Path, Path], tmp_path: Path) -> None:
    new, bins = old
    assert torch.equal(logits(load_model(bins)), logits(load_model(new)))
    assert torch.equal(logits(load_model(bins, quant="nf4")), logits(load_model(new, quant="nf4")))
    assert weights.stored_dtype(bins) == torch.float32
    assert weights.broken(bins) == []
    done = convert(bins, tmp_path / "converted")
    stored = torch.load(bins / weights.BIN, weights_only=True)
    written = load_file(tmp_path / "converted" / weights.SAFE)
    assert done.tensors == len(stored)
    assert all(torch.equal(written[name], value) for name, value in stored.items())
    assert torch.equal(logits(load_model(tmp_path / "converted")), logits(load_model(new)))
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "converted"))
    with pytest.raises(ModelError, match="its weights are safetensors already"):
        convert(tmp_path / "converted", tmp_path / "twice")


def test_shards_without_their_index_are_named(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    (folder / weights.SAFE).rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"shards without an index: model-00001-of-00002\.safetensors"):
        weights.check(folder)


def test_what_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "hub" / "models--org--name" / "snapshots" / "abc")
    for name in ("run/adapter", "adapter", "gguf", "nothing"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name"}')
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    says = {
        tmp_path / "run": "fitune merge",
        tmp_path / "adapter": "--model org/name --adapter",
        tmp_path / "gguf": "llama.cpp",
        tmp_path / "gguf" / "model.gguf": "llama.cpp",
        tmp_path / "hub" / "models--org--name": str(model),
        model / weights.SAFE: f"its folder: {model}",
    }
    for path, text in says.items():
        with pytest.raises(ModelError) as caught:
            early.model(str(path))
        assert text in str(caught.value.fix), path
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        early.model(str(tmp_path / "nothing"))
    assert caught.value.fix is None


def test_a_run_on_old_shards(tmp_path: Path, data_file: Path) -> None:
    new = tiny.save("bloom", tmp_path / "new")
    folder = as_bins(new, tmp_path / "old", tiny.make_model("bloom").state_dict(), shards=3)
    settings: dict[str, Any] = {"data": [str(data_file)], "max_steps": 3, "precision": "fp32", "sample_prompts": 0}
    first = fitune.train(model=str(folder), output=str(tmp_path / "a"), **settings)
    second = fitune.train(model=str(new), output=str(tmp_path / "b"), **settings)
    assert first.last_loss == second.last_loss
    assert fitune.merge(tmp_path / "a", tmp_path / "merged").merge_error <= 1e-5
    done = convert(folder, tmp_path / "converted")
    assert done.files == 3
    assert torch.equal(logits(load_model(tmp_path / "converted")), logits(load_model(new)))


@pytest.mark.shared
@pytest.mark.parametrize("version", ["chatglm-6b", "chatglm2-6b"])
def test_published_chatglms_are_old_files(version: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "golden" / version
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors = {name: value.half() for name, value in tensors.items()}
    folder = as_bins(tmp_path / "new", tmp_path / "old", tensors, shards=2)
    expected = load_file(source / "expected.safetensors")
    with torch.no_grad():
        got = load_model(folder)(input_ids=expected["prompt_ids"]).logits
        exact = load_model(source)(input_ids=expected["prompt_ids"]).logits
    assert (got - exact).abs().max() < 0.02  # of half precision


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing shard", "weights are missing"),
        ("short shard", "damaged|cut off|its header says"),
        ("tensor not in shard", "lacks 1 tensors that the index names"),
        ("tensor not in index", "has 1 tensors that the index does not name"),
        ("index that leads out", "names a file outside of its folder"),
        ("broken index", "cannot be read"),
        ("extra tensor", "have no place in the model"),
        ("missing tensor", "are not in the weights"),
    ],
)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_whole_or_refused(kind: str, fault: str, message: str, tmp_path: Path, data_file: Path) -> None:
    from safetensors.torch import save_file

    new = tiny.save("llama", tmp_path / "new")
    tensors = {name: value.clone() for name, value in tiny.make_model("llama").state_dict().items()}
    if fault == "extra tensor":
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(4, 4)
    if fault == "missing tensor":
        del tensors["model.norm.weight"]
    folder = as_bins(new, tmp_path / "old", tensors, shards=2)
    index = folder / weights.BIN_INDEX
    if kind == "safetensors":
        listed = json.loads(index.read_text())["weight_map"]
        for shard in set(listed.values()):
            save_file(torch.load(folder / shard, weights_only=True), folder / shard.replace(".bin", ".safetensors"))
            (folder / shard).unlink()
        listed = {name: shard.replace(".bin", ".safetensors") for name, shard in listed.items()}
        index.unlink()
        index = folder / weights.SAFE_INDEX
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    listed = json.loads(index.read_text())["weight_map"]
    shard = folder / sorted(set(listed.values()))[0]
    first = next(name for name, file in listed.items() if file == shard.name)
    if fault == "missing shard":
        shard.unlink()
    elif fault == "short shard":
        shard.write_bytes(shard.read_bytes()[:-500])
    elif fault == "tensor not in shard":
        listed["model.layers.7.extra"] = shard.name
    elif fault == "tensor not in index":
        del listed[first]
    elif fault == "index that leads out":
        listed[first] = "../evil.bin"
    if fault == "broken index":
        index.write_text('{"weight_map": [1]}')
    else:
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    with pytest.raises(fitune.FituneError, match=message):
        fitune.train(model=str(folder), data=[str(data_file)], max_steps=1, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def vocabulary(kind: str, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Path:
    """An old folder of a model whose tensors and config were changed."""
    new = tiny.save(kind, tmp_path / "new")
    tensors = {name: value.clone() for name, value in tiny.make_model(kind).state_dict().items()}
    config = json.loads((new / "config.json").read_text())
    change(tensors, config)
    (new / "config.json").write_text(json.dumps(config))
    return as_bins(new, tmp_path / "old", tensors, shards=1)


def test_a_tied_head_need_not_be_in_the_file(tmp_path: Path) -> None:
    folder = vocabulary("llama-tied", tmp_path, lambda tensors, config: tensors.pop("lm_head.weight"))
    model: Any = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(tiny.make_model("llama-tied")))


def test_a_head_of_its_own_must_be_there(tmp_path: Path) -> None:
    folder = vocabulary("llama", tmp_path, lambda tensors, config: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"1 tensors are not in the weights[\s\S]*lm_head"):
        load_model(folder)


def test_padded_vocabularies_and_resized_embeddings(tmp_path: Path) -> None:
    def padded(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(48, 32)])
        config["vocab_size"] = 448  # more rows than the tokenizer has ids

    model = load_model(vocabulary("llama", tmp_path / "a", padded))
    assert len(model.get_input_embeddings().weight) == 448
    assert torch.equal(logits(model)[..., :400], logits(tiny.make_model("llama")))

    def resized(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        padded(tensors, config)
        config["vocab_size"] = 400  # somebody resized the embedding and forgot the config

    with pytest.raises(ModelError, match=r"have no place in the model|cannot be loaded"):
        load_model(vocabulary("llama", tmp_path / "b", resized))


def test_a_file_that_is_written_a_tensor_at_a_time_is_that_of_the_library(tmp_path: Path) -> None:
    there = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16),
        "编": torch.tensor(7), "d": torch.zeros(0, 4), "c": torch.arange(5, dtype=torch.uint8),
        "step": torch.tensor(2.0),
    }  # fmt: skip
    alive = 0

    def late(one: torch.Tensor) -> safe.Late:
        def make() -> torch.Tensor:
            nonlocal alive
            alive += 1
            return one

        return safe.Late(one.dtype, one.shape, make)

    for metadata in (None, {"format": "pt"}):
        save_file(there, tmp_path / "whole.safetensors", metadata=metadata)
        safe.write(tmp_path / "late.safetensors", {name: late(one) for name, one in there.items()}, metadata)
        assert (tmp_path / "late.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert alive == 2 * len(there)  # each is made once
