"""Rows of preferences of random tokens, and a setting of each objective that is not its default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fitune.core.records import Sample
from fitune.data.pairs import Pairs

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.5},
    "kto": {"beta": 0.4, "desirable_weight": 2.0, "undesirable_weight": 0.5},
    "orpo": {"beta": 0.7},
    "simpo": {"beta": 2.5, "gamma": 0.5},
}
LENGTHS = ((9, 14), (5, 4), (20, 11))


def pairs(name: str, lengths: Sequence[tuple[int, int]] = LENGTHS) -> Pairs:
    """Of an objective: so many tokens each answer has with its prompt; a reference that is another model's."""
    random = np.random.default_rng(1)
    made = []
    for chosen, rejected in lengths:
        prompt = random.integers(5, 300, 3).astype(np.int32)
        for length in (chosen, rejected):
            ids = np.concatenate([prompt, random.integers(5, 300, length - 3).astype(np.int32)])
            made.append(Sample(ids, np.arange(length) >= 3, prompt_length=3, shared=3))
    reference = random.normal(-40, 5, (len(lengths), 2)).astype(np.float32)
    good = np.arange(len(lengths)) % 2 == 0
    return Pairs(made, reference, good if name == "kto" else None)
