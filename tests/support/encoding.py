"""What an encoder makes of a row, where a test knows that it makes something of it, and the text of ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fitune.core.records import Conversation, Sample
from fitune.data.encode import Encoder


def sample_of(encoder: Encoder, row: Conversation) -> Sample:
    """The row's sample; a row without one, which has nothing to train, fails the test."""
    sample = encoder.sample(row)
    assert sample is not None, "the row has nothing to train"
    return sample


def decoded(encoder: Encoder, ids: Sequence[int] | NDArray[np.integer]) -> str:
    """The text of ids, by the encoder's tokenizer."""
    text = encoder.tokenizer.decode([int(one) for one in ids])
    assert isinstance(text, str)
    return text
