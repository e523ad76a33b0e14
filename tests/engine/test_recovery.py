"""Steps that do not fit, steps that are not finite, light optimizers, early stopping: nothing is lost or half done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.commands.train import resume_config, train
from fitune.core.config import build
from fitune.core.errors import ConfigError, TrainingError
from fitune.core.events import Watcher
from fitune.data.batches import flat, rounded, split
from fitune.engine import non_finite, optim, out_of_memory
from fitune.engine.checkpoint import RunFolder
from fitune.engine.held_out import HeldOut, held_out
from fitune.engine.step import loss_sum, training_step
from fitune.models.parts import trainable
from support.contract import samples
from support.memory_errors import OOM, careful, fails_above, make, runner
from support.messages import Messages
from support.runs import Crash, CrashAt, digest


def test_a_batch_in_parts_is_the_batch() -> None:
    batch = flat(samples(), range(5))
    for parts in (1, 2, 3, 5, 99):
        pieces = split(batch, parts)
        assert len(pieces) == min(parts, 5)
        assert [row for piece in pieces for row in piece.rows] == list(range(5))
        assert sum(piece.targets for piece in pieces) == batch.targets
        model, _ = make()
        with torch.no_grad():
            whole = loss_sum(model, batch)
            together = torch.stack([loss_sum(model, piece) for piece in pieces if piece.targets]).sum()
            assert torch.allclose(together, whole, rtol=1e-5)


@pytest.mark.parametrize("kind", OOM)
def test_a_step_that_does_not_fit_is_done_again_in_halves_and_is_the_same_step(kind: str) -> None:
    data = [s for s in samples() if len(s) > 1] * 2  # 7, 12, 5, 9, ... tokens
    batches = [flat(data, range(4)), flat(data, range(4, 8))]
    model, optimizer = make(lora={"dropout": 0.0})
    expected, _ = careful(model, optimizer, [piece for batch in batches for piece in split(batch, 4)])
    wanted = {name: p.detach().clone() for name, p in trainable(model).items()}

    model, optimizer = make(lora={"dropout": 0.0})
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    messages: list[str] = []
    fits, half, whole = rounded(19), rounded(21), rounded(33)  # with the filler
    tried = fails_above(model, fits, OOM[kind])
    done, parts = careful(model, optimizer, batches, messages=messages)
    assert parts == 4 if half in tried else parts == 2
    assert len(messages) == tried.count(whole) + sum(1 for n in tried if fits < n < whole)
    assert "out of memory: the step is repeated with micro-batches of at most" in messages[0]
    assert done.loss == pytest.approx(expected.loss, abs=1e-6)
    for name, p in trainable(model).items():
        assert torch.allclose(p, wanted[name], atol=1e-6), name
    assert any(not torch.equal(p, start[name]) for name, p in trainable(model).items())
    _, again = careful(model, optimizer, batches, parts, messages)
    assert again == parts
    assert len(messages) <= 2  # later steps begin with the parts that fit


def test_nothing_is_applied_before_a_whole_step_fits() -> None:
    model, optimizer = make()
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    fails_above(model, 3, OOM["cpu"])
    with pytest.raises(TrainingError) as caught:
        careful(model, optimizer, [flat(samples(), range(5))])
    for part in ("one row alone does not fit into memory: f.jsonl:1, 7 tokens", "--max-length", "--checkpointing"):
        assert part in str(caught.value)
    assert all(torch.equal(p, start[name]) for name, p in trainable(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model, optimizer = make()
    fails_above(model, 3, RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        careful(model, optimizer, [flat(samples(), range(5))])


LIMITED = """
import json, resource, sys
from fitune.core.config import build
from fitune.core.events import Watcher
from fitune.commands.train import train
class Limit(Watcher):
    messages = []
    def message(self, text): self.messages.append(text)
    def plan(self, plan):
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + int(sys.argv[2]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
watch = Limit()
result = train(build(json.load(open(sys.argv[1]))), watch=watch)
print(json.dumps({"messages": [t for t in watch.messages if "memory" in t], "loss": result.held_out_loss_after}))
"""


@pytest.mark.full  # two trainings at a limit
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_limit_on_memory(model_folder: Path, tmp_path: Path) -> None:
    """The operating system refuses the allocation; the run goes on in smaller pieces to the same losses."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {n}?", "completion": "two plus three is five " * 12} for n in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(model_folder), "data": [str(data)], "batch_size": 60, "max_steps": 2, "val_rows": 4,
        "sample_prompts": 0, "method": "full", "lr": 1e-4, "precision": "fp32",
    }  # fmt: skip
    # what the checks before the first step used must go back to the system, or the heap's free room holds the step
    allocator = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    config = tmp_path / "small.json"
    config.write_text(json.dumps({**values, "output": str(tmp_path / "small")}))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(config), "20"], capture_output=True, text=True, check=False,
        env={**os.environ, **allocator},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    small, seen = json.loads(done.stdout.splitlines()[-1]), Messages()
    large = train(build({**values, "output": str(tmp_path / "large")}), watch=seen)
    assert small["messages"]
    assert not [text for text in seen.messages if "memory" in text]
    assert small["loss"] == pytest.approx(large.held_out_loss_after, abs=1e-4)


# ---- not finite ----


def plant(model: Any, name: str, value: float = float("nan")) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (
            "base_model.model.model.layers.1.mlp.up_proj.weight",
            "the weight base_model.model.model.layers.1.mlp.up_proj",
        ),
        ("base_model.model.model.norm.weight", "the weight base_model.model.model.norm.weight"),
    ],
)
def test_the_first_weight_that_is_not_finite_is_named(name: str, place: str) -> None:
    model, optimizer = make()
    plant(model, name)
    batches = [flat(samples(), range(5))]
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    done = training_step(model, batches, optimizer, 1.0)
    assert not done.finite
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())
    steps = runner(model)
    assert steps.check_finite(done, batches, 0, "step-000002") == 1
    assert steps.check_finite(done, batches, 1, "step-000002") == 2
    with pytest.raises(TrainingError) as caught:
        steps.check_finite(done, batches, 2, "step-000002")
    for part in ("3 steps in a row were not finite", place, "f.jsonl:1", "step-000002", "loss nan"):
        assert part in str(caught.value)


def test_an_overflow_inside_is_found_at_the_module_that_makes_it() -> None:
    model, _ = make()
    up = next(m for n, m in model.named_modules() if n.endswith("layers.2.mlp.up_proj"))
    up.register_forward_hook(lambda module, inputs, out: out * float("inf"))
    first, rows = non_finite.first_non_finite(model, [flat(samples(), [0]), flat(samples(), [2])], "flat")
    assert first == "the output of model.layers.2.mlp.up_proj"
    assert rows == (0,)


def test_one_good_step_forgets_the_bad_ones() -> None:
    model, optimizer = make()
    batches = [flat(samples(), range(5))]
    done = training_step(model, batches, optimizer, 1.0)
    assert done.finite
    assert runner(model).check_finite(done, batches, 2, "step-000002") == 0


def test_a_run_that_goes_wrong_stops_and_keeps_its_last_good_checkpoint(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    class Spoil(Watcher):
        """From step 5 on a weight of the base is broken."""

        def step(self, record: Any) -> None:
            if record.step == 4:
                for module in _modules():
                    plant(module, "model.layers.1.mlp.down_proj.weight", float("inf"))

    def _modules() -> list[Any]:
        import gc

        return [o for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM" and not o.lm_head.weight.is_meta]

    values = {"model": str(model_folder), "data": [str(data_file)], "output": str(tmp_path / "run"), "max_steps": 12,
              "save_every": 2, "eval_every": 12, "sample_prompts": 0, "batch_size": 4}  # fmt: skip
    with pytest.raises(TrainingError) as caught:
        train(build(values), watch=Spoil())
    assert "layers.1.mlp.down_proj" in str(caught.value)
    assert "step-000004" in str(caught.value)
    run = RunFolder(tmp_path / "run")
    lines = [json.loads(line) for line in run.steps.read_text().splitlines()]
    assert [line["applied"] for line in lines] == [True] * 4 + [False] * 3
    assert [line["loss"] for line in lines[4:]] == [None] * 3  # never a logged 0.0
    assert run.whole_checkpoints()[0].name == "step-000004"
    assert not run.adapter.exists()


# ---- optimizers ----

NAMES = list(optim.TABLE)
STEPS = {"max_steps": 6, "batch_size": 4, "save_every": 2, "eval_every": 6, "lr": 3e-3, "sample_prompts": 0}


# of each way to keep states one: as they are, paged 8 bits, factors, one state in 8 bits
QUICK = ("adamw", "paged-adamw-8bit", "adafactor", "lion-8bit", "in-backward")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.full) for n in [*NAMES, "in-backward"]]
)
def test_every_optimizer_learns_and_resumes_to_the_same_bits(
    name: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"optimizer": name, "lr": {"sgd": 0.3, "lion": 1e-3, "lion-8bit": 1e-3}.get(name, 3e-3)}
    if name == "in-backward":
        how = {"optimizer_in_backward": True, "max_grad_norm": 0, "optimizer": "adamw-8bit"}
    values = {"model": str(model_folder), "data": [str(data_file)], "method": "full", **STEPS, **how}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train(build({**values, "output": str(whole)}))
    assert done.held_out_loss_after is not None
    assert done.held_out_loss_before is not None
    assert done.held_out_loss_after < done.held_out_loss_before
    with pytest.raises(Crash):
        train(build({**values, "output": str(broken)}), watch=CrashAt(5))
    train(resume_config(str(broken), {}), resume=True)
    assert digest(whole) == digest(broken)
    for path in (whole / "checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".safetensors", ".json")


@pytest.mark.parametrize("name", NAMES)
def test_states_take_the_bytes_of_the_table(name: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(256, 256))
    config = build({"model": "m", "data": ["d"], "optimizer": name})
    optimizer = optim.make({"w": parameter}, config)
    optim.set_learning_rate(optimizer, 1e-3)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, _ = optim.state_tensors(optimizer, {"w": parameter})
    kept = sum(t.numel() * t.element_size() for n, t in tensors.items() if "qmap" not in n)  # a table all share
    assert kept / parameter.numel() == pytest.approx(optim.TABLE[name].state_bytes, abs=0.04)
    # written as they lie there: a copy of all states would be the peak of a full tuning
    held = {t.data_ptr() for states in optimizer.state.values() for t in states.values() if isinstance(t, torch.Tensor)}
    assert all(t.data_ptr() in held for t in tensors.values() if t.numel() > optim.SHARED)


def test_an_optimizer_in_the_backward_pass_does_the_same_and_keeps_no_gradient() -> None:
    batches = [flat(samples(), range(5))]
    model, optimizer = make("full", max_grad_norm=0)
    plain = training_step(model, batches, optimizer, 0.0)
    other, inside = make("full", max_grad_norm=0, optimizer_in_backward=True)
    done = training_step(other, batches, inside, 0.0)
    assert done.loss == plain.loss
    assert done.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    seen = []
    for p in other.parameters():
        p.register_post_accumulate_grad_hook(lambda q: seen.append(sum(r.grad is not None for r in other.parameters())))
    training_step(other, batches, inside, 0.0)
    assert max(seen) <= 1


def test_in_the_backward_pass_a_gradient_that_is_not_finite_is_not_applied() -> None:
    model, optimizer = make("full", max_grad_norm=0, optimizer_in_backward=True)
    layer = model.model.layers[1].mlp.up_proj
    layer.register_full_backward_hook(lambda module, grads, out: (grads[0] * float("nan"),))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = training_step(model, [flat(samples(), range(5))], optimizer, 0.0)
    assert not done.finite
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamw8bit"}, "did you mean 'adamw-8bit'?"),
        ({"optimizer_in_backward": True}, "it is for full"),
        ({"method": "full", "optimizer_in_backward": True, "accumulation": 2, "max_grad_norm": 0}, "accumulation 2"),
        ({"method": "full", "optimizer_in_backward": True}, "max_grad_norm 1.0"),
    ],
)
def test_what_does_not_go_with_an_optimizer_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optim.check(build({"model": "m", "data": ["d"], **values}))
    assert message in str(caught.value)


# ---- early stopping, and the best checkpoint ----


def losses_of(run: Path) -> list[float]:
    return [r.held_out_loss for r in RunFolder(run).read_steps() if r.held_out_loss is not None]


def test_a_run_stops_early_and_ends_with_its_best_weights(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    values = {"model": str(model_folder), "data": [str(data_file)], "max_steps": 60, "eval_every": 2, "batch_size": 4,
              "lr": 0.3, "warmup": 0.0, "sample_prompts": 0, "keep_last": 1}  # fmt: skip
    done = train(build({**values, "output": str(tmp_path / "run"), "patience": 2}))
    found = losses_of(tmp_path / "run")
    assert done.steps < 60
    assert done.held_out_loss_after == min(found)
    assert found[-2:] == [loss for loss in found[-2:] if loss >= min(found)]
    best = train(build({**values, "output": str(tmp_path / "best"), "final": "best", "max_steps": done.steps + 2}))
    assert best.held_out_loss_after == min(losses_of(tmp_path / "best"))
    broken = tmp_path / "broken"
    with pytest.raises(Crash):
        train(build({**values, "output": str(broken), "patience": 2}), watch=CrashAt(done.steps - 1))
    train(resume_config(str(broken), {}), resume=True)
    assert digest(broken) == digest(tmp_path / "run")


@pytest.mark.full
def test_a_run_ends_with_its_best_weights_only_where_asked(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    values = {"model": str(model_folder), "data": [str(data_file)], "max_steps": 8, "eval_every": 2, "batch_size": 4,
              "lr": 0.3, "warmup": 0.0, "sample_prompts": 0}  # fmt: skip
    best = train(build({**values, "output": str(tmp_path / "best"), "final": "best"}))
    last = train(build({**values, "output": str(tmp_path / "last")}))
    found = losses_of(tmp_path / "last")
    assert (best.held_out_loss_after, last.held_out_loss_after) == (min(found), found[-1])
    assert (digest(tmp_path / "best") == digest(tmp_path / "last")) == (found[-1] == min(found))


def test_an_evaluation_that_does_not_fit_goes_over_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: memory for two rows. The figure is the same, and nothing else is caught."""
    messages: list[str] = []

    def work(rows: int) -> int:
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 10 * rows

    assert out_of_memory.in_fewer(work, 8, "held-out rows", messages.append) == 20
    assert messages == [f"out of memory: {n} held-out rows side by side from here on" for n in (4, 2)]
    with pytest.raises(TrainingError, match="a single one of the held-out rows"):
        out_of_memory.in_fewer(lambda rows: work(100), 4, "held-out rows", messages.append)
    with pytest.raises(ValueError, match="other"):
        out_of_memory.in_fewer(lambda rows: int("other"), 4, "held-out rows", messages.append)


def test_a_held_out_loss_that_runs_out_of_memory_does_not_end_the_run(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fitune.commands import active_run
    from fitune.core.config import RunConfig

    real, seen = held_out, list[int]()

    def small(model: Any, batches: Any, layout: Any, objective: Any, *more: Any) -> HeldOut:
        batches = list(batches)
        seen.append(max(len(batch.rows) for batch in batches))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batches, layout, objective, *more)

    given: dict[str, Any] = {
        "model": str(model_folder),
        "data": [str(data_file)],
        "sample_prompts": 0,
        "max_length": 64,
        "max_lost": 1.0,
    }
    how: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "val_share": 0.2}
    plain = train(RunConfig(**given, **how, output=str(tmp_path / "plain")))
    monkeypatch.setattr(active_run, "held_out", small)
    found = train(RunConfig(**given, **how, output=str(tmp_path / "small")))
    assert found.held_out_loss_after == pytest.approx(plain.held_out_loss_after, rel=1e-5)
    assert set(seen) == {1, 2}
