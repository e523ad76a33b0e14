"""Named templates on a real vocabulary: the written chat template gives the ids of training, tools and calls too."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest

from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from fitune.data.tokenizer import load
from fitune.models.handover.proof import best

pytestmark = pytest.mark.shared


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_tools_and_calls_have_the_ids_of_the_rendering(name: str, shared: Path) -> None:
    """In Qwen's vocabulary a full stop or a bracket and the line break behind it are one token."""
    encoder = Encoder(load(shared / "tokenizers" / "qwen2"), TABLE[name])
    jinja, proof, _ = best(encoder, copy(encoder.tokenizer))
    assert jinja is not None
    assert proof.without == []
    assert {"tools", "a tool's result", "text beside a call"} <= set(proof.same)
