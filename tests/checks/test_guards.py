"""The rules about model, run and files: each catches the fault that is planted, and is quiet on a clean run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.checks import guards, leak, savedchecks
from fitune.commands.merge import merge_drift
from fitune.commands.train import resume_config, train
from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError, Problems
from fitune.core.events import Watcher
from fitune.core.records import Layout
from fitune.data.batches import flat
from fitune.engine import optim, step
from fitune.engine.checkpoint import RunFolder
from fitune.engine.step import hidden_states, training_step
from fitune.models import adapters, families, tensors, weights
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import checkpoint_blocks, ready
from support import tiny
from support.contract import KINDS, REFUSED, VARIANTS, config_for, gradients, samples
from support.runs import Crash, CrashAt


def make(variant: str = "lora", kind: str = "llama") -> Any:
    return adapters.attach(ready(tiny.make_model(kind)), config_for(variant)).train()


BATCH = guards.probe(samples())


def clean(model: Any) -> list[Any]:
    return [
        guards.embeddings(model, 300), guards.quantised_trainable(model), guards.nan_hidden(model, BATCH, "flat"),
        guards.grad_reaches(model, BATCH, "flat"), guards.accumulation_equality(model, BATCH, "flat"),
        guards.eval_memory(model), guards.disk_space(Path(), 1000, 4),
    ]  # fmt: skip


def methods_and_families() -> list[Any]:
    """Every method on one model of each build, LoRA on every family; the rest of the product in the full run."""
    quick = ("llama", "gpt2", "bloom", "chatglm")
    return [
        pytest.param(variant, kind, marks=[] if variant == "lora" or kind in quick else pytest.mark.full)
        for variant in ("full", "lora", "prefix", "p-tuning", "houlsby", "freeze", "tail")
        for kind in KINDS
    ]


@pytest.mark.parametrize(("variant", "kind"), methods_and_families())
def test_no_false_alarm_on_any_method_or_family(variant: str, kind: str) -> None:
    assert variant in VARIANTS
    if (variant, kind) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[variant, kind]):
            make(variant, kind)
        return
    assert [finding.level for finding in clean(make(variant, kind))] == ["ok"] * 7


def test_checks_leave_no_trace() -> None:
    model = make("lora")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    clean(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_nan_hidden() -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    found = guards.nan_hidden(model, BATCH, "flat")
    assert found.level == "refuse"
    assert "layers.1.mlp.up_proj.weight" in found.text
    model = make()
    layer = model.get_submodule("base_model.model.model.layers.2.mlp.down_proj")
    layer.register_forward_hook(lambda module, inputs, out: out / 0)
    assert "layers.2.mlp.down_proj" in guards.nan_hidden(model, BATCH, "flat").text


def test_embeddings() -> None:
    model = make()
    assert guards.embeddings(model, 400).level == "refuse"
    assert "token id 400 has no row" in guards.embeddings(model, 400).text
    inner = model.get_base_model()
    inner.lm_head = torch.nn.Linear(32, 390, bias=False)
    assert "the embedding has 400 rows, the output head 390" in guards.embeddings(model, 5).text
    tied = make("lora", "qwen2")
    tied.get_base_model().lm_head.weight = torch.nn.Parameter(tied.get_base_model().lm_head.weight.detach().clone())
    assert guards.embeddings(tied, 5).level == "warn"
    assert "two tensors; config.json says one" in guards.embeddings(tied, 5).text


def test_quantised_trainable() -> None:
    model = make()
    first: Any = next(iter(trainable(model).values()))
    first.quant_state = object()  # as bitsandbytes marks its weights
    found = guards.quantised_trainable(model)
    assert found.level == "refuse"
    assert "1 quantized tensors would be trained" in found.text


def test_grad_reaches() -> None:
    model = make()
    layer = model.get_submodule("base_model.model.model.layers.1")
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs).detach()  # cuts the graph
    found = guards.grad_reaches(model, BATCH, "flat")
    assert found.level == "refuse"
    assert "no gradient reaches" in found.text
    assert "layers.0" in found.text


def test_accumulation_equality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known trap: a mean of the micro-batches' means."""
    model = make()
    real = step.loss_sum

    def mean_of_means(model: Any, batch: Any, layout: Layout) -> torch.Tensor:
        return real(model, batch, layout) / batch.targets

    monkeypatch.setattr(guards, "loss_sum", mean_of_means)
    found = guards.accumulation_equality(model, BATCH, "flat")
    assert found.level == "refuse"
    assert "micro-batches change the gradient" in found.text


def test_same_at_start() -> None:
    base = ready(tiny.make_model("llama"))
    before = guards.start_of(base, samples())
    model = adapters.attach(base, config_for("lora"))
    assert guards.same_at_start(model, before, samples()).level == "ok"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    assert guards.same_at_start(model, before, samples()).level == "refuse"


def test_one_step_need_not_change_both_factors_of_lora() -> None:
    assert [guards.rate_that_moves(0.1, made, 4) for made in (1, 2, 3, 4)] == [0, 0, 0.1, 0.1]
    assert guards.rate_that_moves(0.1, 1, 1) == 0
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 4), torch.randn(2, 4, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    (x @ a.T @ b.T).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad.any()
    assert b.grad.any()


def test_frozen_intact() -> None:
    model = make()
    before = guards.fingerprint(model)
    optimizer = optim.make(trainable(model), config_for("lora"))
    optim.set_learning_rate(optimizer, 1e-2)
    for _ in range(2):
        training_step(model, [BATCH], optimizer, 1.0)
    assert guards.frozen_intact(before, model, 1e-2).level == "ok"
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight")[3] += 1e-7
    found = guards.frozen_intact(before, model, 1e-2)
    assert found.level == "refuse"
    assert "base_model.model.model.norm.weight" in found.text
    still = guards.frozen_intact(guards.fingerprint(model), model, 1e-2)
    assert still.level == "warn"
    assert "have not changed in two steps" in still.text


def old_bit_sum(tensor: torch.Tensor) -> int:
    """As it was, over the whole tensor at once: runs that are stored have these sums."""
    data = tensor.detach().contiguous().view(-1)
    bits = data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()])
    weights = torch.arange(1, 1025).repeat(-(-bits.numel() // 1024))[: bits.numel()]
    return int((bits.to(torch.int64) * weights).sum())


def test_a_fingerprint_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors.pieces, "__defaults__", (2048,))
    torch.manual_seed(0)
    random = torch.randn(70, 101)
    several = [
        random, random.bfloat16(), random.half(), random.double(), random.to(torch.int8), random.T, random[:, 3:40],
        torch.randn(7, 3000).T, torch.randn(3, 5000)[:, ::2], torch.tensor(3.0), torch.empty(0), torch.empty(3, 0),
        torch.full((5000,), -2**62, dtype=torch.int64),
    ]  # fmt: skip
    for tensor in several:
        assert tensors.bit_sum(tensor) == old_bit_sum(tensor)
        assert torch.equal(torch.cat([torch.empty(0, dtype=tensor.dtype), *(p for _, p in tensors.pieces(tensor))]),
                           tensor.reshape(-1))  # fmt: skip
    wrong = random.clone()
    wrong[69, 100] = torch.inf
    assert tensors.finite(random)
    assert not tensors.finite(wrong)
    assert not tensors.finite(wrong.T)


class Largest(TorchDispatchMode):
    """The most bytes of an output of any operation."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_checks_take_little_memory_beside_a_large_embedding() -> None:
    """An embedding of 32,000 x 768 took 567 MiB to be fingerprinted."""
    model = torch.nn.Embedding(32_000, 768)
    with Largest() as seen:
        guards.fingerprint(model)
        assert tensors.finite(model.weight)
    assert 0 < seen.bytes <= 16 * 2**20


def test_checks_hold_one_gradient_at_a_time() -> None:
    """All at once are what an optimizer in the backward pass saves."""
    model = make("full")
    held: list[int] = []

    def count(parameter: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # before the checks' own
    assert guards.grad_reaches(model, BATCH, "flat").level == "ok"
    assert guards.accumulation_equality(model, BATCH, "flat").level == "ok"
    assert len(held) > 20
    assert max(held) == 1


def test_disk_space(tmp_path: Path) -> None:
    found = guards.disk_space(tmp_path / "not" / "there", 10 * 2**20, 4, free=49 * 2**20)
    assert found.level == "refuse"
    assert found.text == "50 MiB for 4 checkpoints and the result, 49 MiB free"
    assert guards.disk_space(tmp_path, 10 * 2**20, 4, free=51 * 2**20).level == "ok"


def test_base_intact(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    facts = weights.facts(folder)
    assert guards.base_intact(folder, facts).level == "ok"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "its header says" in guards.base_intact(folder).text
    file.write_bytes(whole[:6])
    assert "is cut off" in guards.base_intact(folder).text
    file.write_bytes(whole)
    tiny.make_model("llama").to(torch.bfloat16).save_pretrained(str(folder))
    found = guards.base_intact(folder, facts)
    assert found.level == "refuse"
    assert "changed since this run began: model.safetensors" in found.text
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    assert "part-2.safetensors is missing" in guards.base_intact(folder).text


def test_load_strict(model_folder: Path, tmp_path: Path) -> None:
    """Tensors that are not in the weights would be random; an adapter's tensors must all find their place."""
    folder = tiny.save("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="would be random"):
        load_model(folder)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 32)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="have no place in the model"):
        load_model(folder)
    adapters.save(make(), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored.pop(next(iter(stored)))
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="missing"):
        load_model(model_folder, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("variant", ["lora", "lora-pissa", "houlsby", "p-tuning", "freeze"])
def test_saved_complete(variant: str, tmp_path: Path) -> None:
    model = make(variant)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.01)
    adapters.save(model, tmp_path)
    assert savedchecks.saved_complete(model, tmp_path, BATCH, "flat").level == "ok"
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    name = sorted(stored)[0]
    save_file({**stored, name: stored[name] + 1e-3}, file)
    found = savedchecks.saved_complete(model, tmp_path, BATCH, "flat")
    assert found.level == "refuse"
    assert name in found.text
    stored.pop(name)
    save_file(stored or {"other": torch.zeros(1)}, file)
    assert savedchecks.saved_complete(model, tmp_path, BATCH, "flat").level == "refuse"


def test_merge_drift() -> None:
    assert merge_drift(1e-7, 2e-3, "bf16").level == "ok"
    assert merge_drift(0.1, 0.1, "bf16").level == "refuse"  # the wrong base, a lost tensor
    assert merge_drift(1e-7, 0.5, "bf16").level == "refuse"  # weights that 16 bits cannot hold


STEPS = {"max_steps": 6, "batch_size": 4, "save_every": 2, "eval_every": 6, "sample_prompts": 0, "lr": 1e-2}


@pytest.fixture
def broken(model_folder: Path, data_file: Path, tmp_path: Path) -> Path:
    """A run that ended after step 5."""
    values = {"model": str(model_folder), "data": [str(data_file)], "output": str(tmp_path / "run"), **STEPS}
    with pytest.raises(Crash):
        train(build(values), watch=CrashAt(5))
    return tmp_path / "run"


def go_on(run: Path) -> list[str]:
    """What was said while it went on."""
    messages: list[str] = []

    class Hear(Watcher):
        def findings(self, findings: Any) -> None:
            messages.extend(f"{f.level} {f.rule}: {f.text}" for f in findings)

    train(resume_config(str(run), {}), resume=True, watch=Hear())
    return messages


def test_partial_checkpoint(broken: Path) -> None:
    newest = RunFolder(broken).whole_checkpoints()[0]
    assert newest.name == "step-000004"
    (newest / "MANIFEST.json").unlink()
    messages = go_on(broken)
    assert any(
        "fixed partial-checkpoint: step-000004 not complete" in line and "step-000002" in line for line in messages
    )
    checks = json.loads((broken / "checks.json").read_text())
    assert "partial-checkpoint" in {check["rule"] for check in checks}
    assert "partial-checkpoint" in (broken / "report.html").read_text(encoding="utf-8")


def test_resume_identity(broken: Path) -> None:
    run = RunFolder(broken)
    loaded = run.load(run.whole_checkpoints()[0])
    parameters = loaded.trainable
    steps = len(run.read_steps())
    assert savedchecks.resume_identity(loaded, parameters, steps).level == "ok"
    name = next(iter(parameters))
    without = {key: value for key, value in loaded.optimizer.items() if not key.startswith(name)}
    faults = [
        (replace(loaded, trainable={}), steps, "other trained tensors"),
        (replace(loaded, trainable={**parameters, name: torch.zeros(1)}), steps, "other trained tensors"),
        (replace(loaded, optimizer=without), steps, "no optimizer state"),
        (replace(loaded, rng={}), steps, "random numbers"),
        (loaded, 1, "1 steps are logged"),
    ]
    for fault, logged, text in faults:
        found = savedchecks.resume_identity(fault, parameters, logged)
        assert found.level == "refuse"
        assert text in found.text


def test_unknown_key() -> None:
    with pytest.raises(Problems) as caught:
        build({"model": "m", "data": ["d"], "lora": {"rnak": 4}, "epochz": 3})
    assert "did you mean 'rank'?" in str(caught.value)
    assert "did you mean 'epochs'?" in str(caught.value)


def test_a_run_tells_every_rule_and_the_report_has_all(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    values = {"model": str(model_folder), "data": [str(data_file)], "output": str(tmp_path / "run"), **STEPS}
    train(build(values))
    data = json.loads((tmp_path / "run" / "data.json").read_text())["findings"]
    checks = json.loads((tmp_path / "run" / "checks.json").read_text())
    rules = {finding["rule"] for finding in [*data, *checks]}
    assert rules >= {
        "family", "base-intact", "trainable-set", "quantised-trainable", "packing-leak", "same-at-start", "embeddings",
        "nan-hidden", "grad-reaches", "accumulation-equality", "disk-space", "eval-memory", "frozen-intact",
        "saved-complete", "stale-cache",
    }  # fmt: skip
    warned = {finding["rule"] for finding in [*data, *checks] if finding["level"] not in ("ok", "fixed")}
    assert warned <= {"base-loss"}  # the model is random: it does worse than guessing
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(rule in page for rule in rules)


def test_a_model_that_is_not_finite_is_refused_before_the_first_step(data_file: Path, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Problems) as caught:
        train(build({"model": str(folder), "data": [str(data_file)], "output": str(tmp_path / "run"), **STEPS}))
    assert "model.norm.weight has NaN or infinite values" in str(caught.value)
    assert "see each other" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_leaking_batch_is_refused_where_that_layout_is_asked_for() -> None:
    model: Any = ready(tiny.make_model("llama"))
    model.model.layers[0].self_attn.layer_idx = 0
    forward = model.model.forward

    def leaking(*args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        if cu_seq_lens_q is not None:
            cu_seq_lens_q = cu_seq_lens_q[[0, -1]]  # one document, not two
        return forward(*args, cu_seq_lens_q=cu_seq_lens_q, **kwargs)

    model.model.forward = leaking
    two = [s for s in samples() if len(s) > 1]
    assert leak.packing_leak(model, two, "flat")[1].level == "refuse"
    layout, found = leak.packing_leak(model, two)
    assert (layout, found.level) == ("padded", "fixed")
    assert flat(two, [0, 1]).bounds.tolist() == [0, 7, 19]


@pytest.mark.parametrize(
    ("every", "flags"), [(True, [1, 1, 1]), (1, [1, 1, 1]), (2, [0, 1, 0]), (3, [0, 0, 1]), (False, [0] * 3)]
)
def test_checkpointing_every_nth_block_gives_the_same_gradients(every: bool | int, flags: list[int]) -> None:
    plain = gradients(make())
    model = make()
    inner = model.get_base_model()
    checkpoint_blocks(model, families.of(inner), every)
    assert [int(block.gradient_checkpointing) for block in inner.model.layers] == flags
    for name, gradient in gradients(model).items():
        assert (gradient - plain[name]).abs().max() <= 1e-6 * max(1.0, float(plain[name].abs().max())), name


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    """Bytes saved for backward, counted: the fewer blocks keep theirs, the fewer there are."""

    def saved(every: bool | int) -> int:
        model = make("full")
        checkpoint_blocks(model, families.of(model), every)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_states(model, BATCH, "flat")
        return total

    assert saved(True) < saved(2) < saved(False)
