"""Checks of preferences: what a pair, or a labelled answer, must be to teach anything.

In: what was prepared. Out: Findings, each rule a function of its own, named as in the report. No torch here.
"""

from __future__ import annotations

import numpy as np

from fitune.checks.labelchecks import NAMED
from fitune.core.options import KtoOptions
from fitune.core.records import Finding
from fitune.data.pairs import Pairs
from fitune.data.prepared import Prepared
from fitune.data.store import in_pairs, trained_of

LONGER = 1.25  # times the rejected answers' length above which length is a shortcut
SHARE = 0.75  # of the pairs in which the same side is longer, above which it is one


def pairs_differ(p: Prepared) -> Finding:
    """Both answers of a pair differ, in the data and after cutting: equal ones cancel out, or teach nothing."""
    pairs = _pairs(p)
    same = np.array([np.array_equal(pair.chosen.ids, pair.rejected.ids) for pair in pairs], np.bool_)
    if not same.any():
        return Finding("pairs-differ", "ok", f"both answers of all {len(pairs):,} pairs differ")
    rows = p.rows_of[::2][same]
    equal = [n for n in rows if p.conversations[int(n)].messages == p.conversations[int(n)].other().messages]
    named = ", ".join(str(p.conversations[int(row)].source) for row in rows[:NAMED])
    what = []
    if equal:
        what.append(f"{len(equal):,} of {len(pairs):,} pairs have one answer twice")
    if len(equal) < len(rows):
        what.append(f"{len(rows) - len(equal):,} are the same once they are cut to {p.report.max_length} tokens")
    text = f"{' and '.join(what)} ({named}{', ...' * (len(rows) > NAMED)}): they teach nothing"
    fix = "leave such rows out" if len(equal) == len(rows) else "a larger --max-length, or leave such rows out"
    return Finding("pairs-differ", "refuse" if same.all() else "warn", text, fix)


def length_bias(p: Prepared) -> Finding:
    """How much longer chosen answers are than rejected ones: where length says which is which, length is learned."""
    tokens = trained_of(p.samples).reshape(-1, 2)
    chosen, rejected = (float(one) for one in tokens.mean(axis=0))
    longer, shorter = (float((sign * (tokens[:, 0] - tokens[:, 1]) > 0).mean()) for sign in (1, -1))
    text = (
        f"chosen answers have {chosen:.0f} tokens on average, rejected ones {rejected:.0f}; "
        f"the chosen one is longer in {longer:.0%} of the pairs, shorter in {shorter:.0%}"
    )
    ratio = chosen / max(1e-9, rejected)
    if max(longer, shorter) <= SHARE and 1 / LONGER <= ratio <= LONGER:
        return Finding("length-bias", "ok", text)
    kind = "long" if longer > shorter else "short"
    by_token = p.config.objective in ("simpo", "ipo", "orpo")
    fix = None if by_token else "--objective simpo or ipo, which count by the token; or pairs of like length"
    return Finding("length-bias", "warn", f"{text}: the model may learn to be {kind}", fix)


def both_labels(p: Prepared) -> Finding:
    """KTO needs good and bad answers, and their weights in the loss to be of about the same size."""
    pairs = _pairs(p)
    assert pairs.desirable is not None
    good = int(pairs.desirable.sum())
    bad = len(pairs) - good
    if not good or not bad:
        text = f"all {len(pairs):,} answers are marked as {'good' if good else 'bad'} ones"
        fix = "--objective sft trains good answers; KTO needs some of both kinds"
        return Finding("both-labels", "refuse", text, fix)
    options: KtoOptions = p.config.kto
    ratio = options.desirable_weight * good / max(1e-9, options.undesirable_weight * bad)
    text = f"{good:,} good answers and {bad:,} bad ones; with their weights they count {ratio:.2f} to 1"
    if 0.5 <= ratio <= 2:  # the paper asks for 1 to 4/3 (equation 8)
        return Finding("both-labels", "ok", text)
    wanted = f"--kto.undesirable-weight {good / bad:.2g}" if ratio > 1 else f"--kto.desirable-weight {bad / good:.2g}"
    return Finding("both-labels", "warn", text, f"{wanted} makes them even")


def _pairs(p: Prepared) -> Pairs:
    pairs = in_pairs(p.samples, p.config.wanted)
    assert isinstance(pairs, Pairs)
    return pairs
