"""Scaled rotary positions: documents of a batch, past the original length, are what they are alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fitune.checks import leak
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine.step import hidden_states
from fitune.models.configs import longest_row
from fitune.models.kernels import dynamic_rope
from fitune.models.prepare import ready
from support import tiny

STARTED = {"original_max_position_embeddings": 16, "factor": 4.0, "rope_theta": 1e4}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {"rope_type": "llama3", **STARTED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", **STARTED},
    "longrope": {"rope_type": "longrope", **STARTED, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
}
LENGTHS = (50, 34, 9)  # the original length is 16


def model_of(kind: str) -> Any:
    positions = 16 if kind == "dynamic" else 64
    return ready(tiny.make_model("qwen3", rope_parameters=dict(KINDS[kind]), max_position_embeddings=positions))


def rows() -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(random.integers(5, 300, length).astype(np.int32), np.arange(length) > 2) for length in LENGTHS]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_documents_past_the_original_length_are_what_they_are_alone(kind: str) -> None:
    model, samples = model_of(kind), rows()
    layout, _ = leak.packing_leak(model, samples)
    assert layout == ("documents" if kind in ("dynamic", "longrope") else "flat")
    together = hidden_states(model, flat(samples, [0, 1, 2]), layout)
    alone = []
    for sample in samples:  # each by a model that has seen no other row
        fresh = model_of(kind)
        alone.append(fresh.model(input_ids=torch.from_numpy(sample.ids)[None].long()).last_hidden_state[0])
    expected = torch.cat(alone)
    assert (together - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert longest_row(model.config) == 64


@torch.no_grad()
def test_without_the_reset_a_longer_row_before_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_rope, "reset", lambda model: None)
    model, samples = model_of("dynamic"), rows()
    together = hidden_states(model, flat(samples, [0, 1]), "documents")
    own = model_of("dynamic").model(input_ids=torch.from_numpy(samples[1].ids)[None].long()).last_hidden_state[0]
    assert (together[-LENGTHS[1] :] - own).abs().max() > 1e-3 * own.abs().max()
