"""What the labels of a sample must be: each answer's own tokens and its stop, wherever the answer stands.

In: a row, one of its samples, the turns that it trains. Out: what is wrong, as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fitune.core.errors import DataError, FituneError, shorten
from fitune.core.records import SPAN, Conversation, Message, Sample
from fitune.data.batches import flat
from fitune.data.encode import Encoder
from fitune.data.store import Samples
from fitune.data.templates import thoughts
from fitune.data.templates.rendering import CALL_ID
from fitune.data.tokenizer import encode

_COUNTED = re.compile(rf'{CALL_ID.pattern}|"(?:tool_call_)?id": "[0-9]+"')  # ids that fitune gives, or the template
EXPECTED = "labels on each answer's own text and its stop"
FIX = "leave such rows out with --skip-bad, or choose a template by name: --template chatml"


def wrong(encoder: Encoder, row: Conversation, sample: Sample, turns: Sequence[int]) -> str:
    """What is wrong with the labels; an empty text where nothing is.

    Args:
        encoder: made the sample.
        row: the conversation.
        sample: uncut.
        turns: of the answers that it trains, ascending.
    """
    labelled = flat([sample], [0]).label_rows + 1  # behind the shift
    filled = any(SPAN in message.content for message in row.messages)
    turns = turns[:1] if filled else turns
    starts = [max(1, len(encoder.prompt(row.messages[:turn], row.tools))) for turn in turns]
    for turn, begins, after in zip(turns, starts, [*starts[1:], len(sample)], strict=True):
        first = int(labelled[0]) if len(labelled) else -1
        if first != begins:
            return f"the first label is token {first}, the answer begins at token {begins}"
        # to the first gap, or to where the next answer follows at once
        run = labelled[(labelled - begins == np.arange(len(labelled))) & (labelled < after)]
        labelled = labelled[len(run) :]
        here, alone = sample.ids[run].tolist(), [] if filled else _alone(encoder, row, turn)
        if alone and here != alone and _text(encoder, here) != _text(encoder, alone):
            said, own = (shorten(str(encoder.tokenizer.decode(ids))) for ids in (here, alone))
            return f"{len(here)} labels in turn {turn + 1}, where its answer has {len(alone)}: {said}, not {own}"
    return ""


def missing(encoder: Encoder, row: Conversation, sample: Sample, turns: Sequence[int]) -> str:
    """What the labels of a sample leave out of its answers; an empty text where they say all of them.

    Args:
        encoder, row, sample, turns: as for `wrong`.
    """
    if any(SPAN in message.content for message in row.messages):
        return ""
    said = _squeezed(encoder, sample.ids[sample.mask].tolist())
    for turn in turns:
        content = row.messages[turn].content
        if any(tag in content for kind in thoughts.KINDS for tag in (kind.open, kind.close)):
            continue  # templates move thoughts
        wanted = _squeezed(encoder, encode(encoder.tokenizer, content, literal=False))
        if wanted not in said:
            return f"the labels of turn {turn + 1} are not its whole text: {shorten(said)}, not {shorten(wanted)}"
    return ""


def _squeezed(encoder: Encoder, ids: Sequence[int]) -> str:
    """A text without white space, which templates trim, and without its stops."""
    ids = [i for i in ids if i not in encoder.stop_ids]
    return "".join(str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).split())


def of_row(encoder: Encoder, row: Conversation, made: Sequence[Sample]) -> list[tuple[Conversation, Sample, list[int]]]:
    """A row's samples and the turns that each trains; none where one is cut, or the row is plain text."""
    if row.format == "text" or any(sample.cut_prompt or sample.cut_answer for sample in made):
        return []
    if encoder.both and row.rejected:
        both = zip([row, row.other()], made, strict=False)
        return [(one, sample, encoder.side_turns(one)) for one, sample in both]
    turns = sorted(encoder.trained_turns(row.messages))
    each = [[turn] for turn in turns] if encoder.one_answer_per_sample(row) else [turns]
    return [(row, *both) for both in zip(made, each, strict=True)] if len(each) == len(made) else []


def wrong_rows(encoder: Encoder, samples: Samples, numbers: Iterable[int]) -> dict[int, DataError]:
    """Rows whose labels are wrong, by number, each as an error that names the row.

    Args:
        encoder: made the samples.
        samples: of all rows, uncut.
        numbers: of the rows to look at, ascending.
    """
    found: dict[int, DataError] = {}
    row_of = samples.column("row")
    for number in numbers:
        made = [samples[n] for n in range(*np.searchsorted(row_of, [number, number + 1]))]
        for row, sample, turns in of_row(encoder, samples.rows[number], made):
            if text := wrong(encoder, row, sample, turns):
                what = f"{row.source}: the labels are not the answer's own"
                found[number] = DataError(what, received=text, expected=EXPECTED, fix=FIX)
    return found


def _alone(encoder: Encoder, row: Conversation, turn: int) -> list[int]:
    """The labels of an answer behind a question; none where the template has none for it there."""
    answer = replace(row.messages[turn], weight=1.0)
    asked = Conversation((Message("user", "?"), answer), row.source, row.format, row.tools)
    try:
        sample = encoder.with_max_length(None).sample(asked)
    except FituneError:
        return []
    return [] if sample is None else [int(i) for i in sample.ids[sample.mask]]


def _text(encoder: Encoder, ids: Sequence[Any]) -> str:
    """What labels say, without their stop (the role that follows may decide it), the tags of a thought (some templates
    open one behind a question only) and ids of calls (which count them)."""
    ids = [i for i in ids if i not in encoder.stop_ids]
    text = _COUNTED.sub("", str(encoder.tokenizer.decode(ids)))
    return "".join("".join(thoughts.pieces(text)[::2]).split())
