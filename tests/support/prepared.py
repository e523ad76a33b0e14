"""Data as the checks see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fitune.core.config import build
from fitune.core.records import Conversation, DataReport, Message, Source
from fitune.data.encode import Encoder
from fitune.data.fitting import counted
from fitune.data.prepared import Prepared
from fitune.data.templates import choose
from support import tiny
from support.encoding import sample_of

TURNS = (
    Message("system", "be brief"),
    Message("user", "hi <|end|> there"),
    Message("assistant", "hello"),
    Message("user", "你好"),
    Message("assistant", "很好"),
)


ROW = Conversation(TURNS, Source("f.jsonl", 1), "messages")


def prepared(
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 64,
    rows: Sequence[Conversation] = (ROW,),
    template: str = "auto",
    **changes: Any,
) -> Prepared:
    rows = [replace(rows[n % len(rows)], source=Source("f.jsonl", n + 1)) for n in range(20)]
    encoder = Encoder(tokenizer, choose(template, tokenizer), max_length, changes.pop("train_on", "all"))
    samples, rows_of = tiny.encoded(rows, encoder)
    report = DataReport(rows=20, max_length=max_length, lengths={"max": 40, "p99": 40})
    report = counted(report, samples, rows_of, len(rows))
    config = build({"model": "m", "data": ["d"]})
    values = {"vocabulary": 400, "limit": 1 << 30, "folder": Path(), **changes}
    whole = encoder.with_max_length(None)
    report.lost_at_limit = sum(sample_of(whole, row).needed > values["limit"] for row in rows)
    return Prepared(config, rows, list(samples), report, encoder, **values, rows_of=rows_of)
