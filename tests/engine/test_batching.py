"""Answers side by side have the bits that each has alone, whatever the model, the method and the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError
from fitune.data.encode import Encoder
from fitune.data.templates import choose
from fitune.engine import trial
from fitune.engine.batching import Batcher, Ended, Request, Room
from fitune.engine.drawing import Sampling, Token
from fitune.engine.forward import Forward
from fitune.engine.worker import Full, Worker
from fitune.models import attached, families
from fitune.models.adapters import attach
from fitune.models.kernels.cached import Cache
from fitune.models.load import Tuned
from fitune.models.switches import SDPA, attention, evaluating
from support import elsewhere, tiny

PROMPTS = [[7, 9, 30, 200, 11], [5] * 40, [33, 34, 35], list(range(20, 90)), [250], [9, 7, 30, 201], [120, 121] * 9]
TOKENS = 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 2.0},
        {"max_new_tokens": 0}, {"max_new_tokens": 2.5},
    ],
)  # fmt: skip
def test_settings_by_which_nothing_can_be_drawn_are_refused(wrong: dict[str, Any]) -> None:
    """In Python too: a negative temperature drew the least probable tokens."""
    with pytest.raises(ConfigError, match="out of range"):
        Sampling(**wrong)


def tuned_of(kind: str, method: str = "", **settings: Any) -> Tuned:
    """A random model that never stops by itself; what its method adds is random too."""
    model = tiny.make_model(kind)
    if method:
        config = build({"model": "m", "data": ["d"], "method": method, **settings})
        model = attach(model, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    words = tiny.make_tokenizer()
    template = choose("auto", words)
    encoder = Encoder(words, template)
    encoder.stop_ids = [399]
    return Tuned(model, words, template, encoder, families.of(model))


def answered(
    tuned: Tuned, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None, room: Room | None = None
) -> list[list[Token]]:
    """The tokens of each answer, with the probabilities of the whole vocabulary: all bits of its logits."""
    found: list[list[Token]] = [[] for _ in prompts]
    with Batcher.open(tuned, room or Room()) as batcher:
        for ids, into in zip(prompts, found, strict=True):
            batcher.add(Request(ids, sampling or Sampling(max_new_tokens=TOKENS), into.append, top=400))
        while batcher.busy:
            batcher.step()
    return found


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def generated(tuned: Tuned, prompt: list[int]) -> list[int]:
    """By transformers' own loop."""
    there = torch.tensor([prompt])
    how = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=[399], pad_token_id=0)
    with torch.no_grad(), evaluating(tuned.model), attention(tuned.model, SDPA):
        made = tuned.model.generate(input_ids=there, attention_mask=torch.ones_like(there), generation_config=how)
    new: list[int] = made[0, len(prompt) :].tolist()
    return [i for i in new if i != 399]


@pytest.mark.parametrize("kind", [*tiny.FAMILIES, *tiny.MORE, *tiny.UNKNOWN, *tiny.PARTIAL])
def test_each_gets_the_bits_that_it_gets_alone_and_the_ids_that_transformers_gives(kind: str) -> None:
    tuned = tuned_of(kind)
    prompts = PROMPTS[:3] if kind in tiny.PARTIAL else PROMPTS
    if kind == "chatglm":  # its prompts end in [gMASK] <sop>
        config: Any = tuned.model.config
        prompts = [[*prompt, config.gmask_token_id, config.bos_token_id] for prompt in prompts]
    together = answered(tuned, prompts)
    assert together == [answered(tuned, [prompt])[0] for prompt in prompts]
    assert [ids(one) for one in together] == [generated(tuned, prompt) for prompt in prompts]
    assert attached.of(tuned.model).tile == EXPECTED.get(kind, trial.ROWS)


EXPECTED = {
    "bloom": 0, "chatglm": 0, "qwen3_moe": 1, "mixtral": 1, "gpt_oss": 1, "qwen3_next": 0, "qwen3_5": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"lora": {"rank": 2}}),
        ("bitfit", {"bitfit": {"add": True}}),
        ("adapter", {}),
        ("ia3", {}),
        ("prompt", {"prompt": {"tokens": 3}}),
        ("p-tuning", {"p_tuning": {"tokens": 3}}),
        ("prefix", {"prefix": {"tokens": 3}}),
    ],
)
def test_methods_answer_side_by_side_too(method: str, settings: dict[str, Any]) -> None:
    tuned = tuned_of("llama", method, **settings)
    together = answered(tuned, PROMPTS)
    # elsewhere the bits of LoRA's narrow products may depend on a row's neighbours (AMX), and the trial finds it
    assert attached.of(tuned.model).tile in ((trial.ROWS, 1) if elsewhere.than_measured("torch") else (trial.ROWS,))
    assert together == [answered(tuned, [prompt])[0] for prompt in PROMPTS]
    assert [ids(one) for one in together] == [generated(tuned, prompt) for prompt in PROMPTS]


def test_a_prompt_longer_than_a_piece_is_answered_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, prompt = tuned_of("mistral"), [(7 * n) % 390 for n in range(100)]
    expected = ids(answered(tuned, [prompt])[0])
    monkeypatch.setattr("fitune.engine.batching.PIECE", 16)
    assert ids(answered(tuned, [prompt, *PROMPTS])[0]) == expected


def test_draws_with_a_seed_do_not_depend_on_the_neighbours() -> None:
    tuned, sampling = tuned_of("llama"), Sampling(temperature=1.3, top_p=0.9, max_new_tokens=TOKENS, seed=5)
    together = answered(tuned, PROMPTS, sampling)
    assert together == [answered(tuned, [prompt], sampling)[0] for prompt in PROMPTS]
    assert together != answered(tuned, PROMPTS, Sampling(1.3, 0.9, TOKENS, seed=6))


def test_rows_that_depend_on_their_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Forward.tile

    def other(self: Forward, caches: Sequence[Cache], last: Sequence[int], rows: int) -> torch.Tensor:
        logits = whole(self, caches, last, rows)
        return logits + torch.arange(rows)[:, None] * 1e-6

    monkeypatch.setattr(Forward, "tile", other)
    assert trial.tile(tiny.make_model("llama")) == 1


def test_a_cache_that_is_read_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Cache.put

    def other(self: Cache, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = put(self, layer, key, value)
        return keys, values.roll(1, dims=2)

    monkeypatch.setattr(Cache, "put", other)
    assert trial.tile(tiny.make_model("llama")) == 0


@pytest.mark.parametrize("room", [Room(running=2), Room(tokens=100)])
def test_what_has_no_place_waits_and_gets_the_same(room: Room) -> None:
    tuned = tuned_of("llama")
    assert answered(tuned, PROMPTS, room=room) == answered(tuned, PROMPTS)


def test_a_cancelled_request_frees_its_place() -> None:
    tuned, ends = tuned_of("llama"), list[Ended]()
    with Batcher.open(tuned, Room(running=1)) as batcher:
        first = Request(PROMPTS[0], Sampling(max_new_tokens=200), lambda token: None, ends.append)
        second = Request(PROMPTS[1], Sampling(max_new_tokens=2), lambda token: None, ends.append)
        batcher.add(first)
        batcher.add(second)
        batcher.step()
        assert (batcher.running, len(batcher.waiting)) == (1, 1)
        first.cancelled = True
        while batcher.busy:
            batcher.step()
    assert [end.reason for end in ends] == ["cancelled", "length"]


@pytest.mark.parametrize(("prompt", "room"), [([], Room()), ([5] * 5000, Room()), ([5] * 50, Room(tokens=52))])
def test_what_never_fits_is_refused(prompt: list[int], room: Room) -> None:
    with Batcher.open(tuned_of("llama"), room) as batcher, pytest.raises(ModelError):
        batcher.add(Request(prompt, Sampling(max_new_tokens=3), lambda token: None))


def test_a_worker_refuses_what_is_too_much_and_survives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    tuned, done = tuned_of("llama"), threading.Semaphore(0)
    ends: list[Ended] = []

    def ended(end: Ended) -> None:
        ends.append(end)
        done.release()

    def request() -> Request:
        return Request(PROMPTS[0], Sampling(max_new_tokens=3), lambda token: None, ended)

    batcher = Batcher(tuned, Room(running=1))
    step = Batcher.step
    monkeypatch.setattr(Batcher, "step", lambda self: (_ for _ in ()).throw(ValueError("planted")))
    with Worker([batcher], waiting=1) as worker:
        with pytest.raises(Full):
            worker.submit(batcher, [request() for _ in range(3)])
        worker.submit(batcher, [request()])
        assert done.acquire(timeout=500)
        monkeypatch.setattr(Batcher, "step", step)
        worker.submit(batcher, [request()])
        assert done.acquire(timeout=500)
        assert worker.open == 0
    assert [end.reason for end in ends] == ["failed", "length"]
