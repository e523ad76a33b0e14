"""How many answers go through a model side by side, found by trying it.

In: a model. Out: the rows of a tile; 0 for a model that answers one request after the other, through transformers'
`generate`. Which it is, the model itself shows: its logits out of a cache must be those of its own forward pass, and
the bits of a row must not depend on its place in the tile or on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fitune.engine.forward import Forward, answering
from fitune.engine.out_of_memory import is_out_of_memory
from fitune.models import attached
from fitune.models.attached import compute_dtype
from fitune.models.interfaces import Config, causal_lm, decoder
from fitune.models.switches import SDPA, attention, computing, evaluating

ROWS = 8
PROBE = 12  # tokens of a trial's prompt
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit


def tile(model: nn.Module) -> int:
    """The rows of a tile: ROWS; 1 where neighbours would change a row's bits; 0 where a model cannot be run so.

    It is tried once, and kept with the model.
    """
    known = attached.of(model)
    if known.tile is None:
        known.tile = _tried(model)
    return known.tile


def _tried(model: nn.Module) -> int:
    inner = causal_lm(model)
    if attached.of(model).flat is not None or hasattr(decoder(inner), "flat_positions"):
        return 0  # ALiBi, a prompt that attends both ways: their attention is their own
    if _rope_depends_on_length(inner.config):
        return 0
    try:
        with answering(model):
            return _compared(model, ROWS)
    except Exception as error:  # whatever a model's own code says to a call that it does not know
        if is_out_of_memory(error):
            raise
        return 0


def _compared(model: nn.Module, rows: int) -> int:
    forward = Forward.of(model)
    vocabulary = causal_lm(model).config.vocab_size
    ids = [(7919 * n + 13) % vocabulary for n in range(PROBE)]
    others = [(104729 * n + 5) % vocabulary for n in range(PROBE // 2)]
    first, other = forward.start(), forward.start()
    forward.prompt(first, ids[:-1])
    forward.prompt(other, others)
    if len(first.layers) != causal_lm(model).config.num_hidden_layers:
        return 0  # some layer keeps its state otherwise, or takes another's
    alone = forward.tile([first.copy()], ids[-1:], rows)[0]
    if not _close(alone, _own(model, ids), compute_dtype(model)):
        return 0
    places = []
    for place in (1, rows - 1):
        caches = [first.copy() if n in (0, place) else other.copy() for n in range(rows)]
        last = [ids[-1] if n in (0, place) else others[n % len(others)] for n in range(rows)]
        logits = forward.tile(caches, last, rows)
        places += [logits[0], logits[place]]
    same = all(torch.equal(alone, one) for one in places)
    return rows if same and not _has_experts(causal_lm(model).config) else 1


def _own(model: nn.Module, ids: list[int]) -> Tensor:
    """(V,): the logits behind ids by the model's own forward pass, with PEFT's wrapper around it."""
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with evaluating(model), attention(model, SDPA), computing(model):
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
    return logits


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    scale = float(expected.float().abs().max().clamp_min(1e-6))
    return bool(float((found.float() - expected.float()).abs().max()) <= TOLERANCE[dtype] * scale)


def _has_experts(config: Config) -> bool:
    """How many rows an expert gets depends on all rows of a tile: a trial may show no difference, and a row would see
    one all the same."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)


def _rope_depends_on_length(config: Config) -> bool:
    """Positions are turned otherwise once one row of a tile is long."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    return bool(kinds & {"dynamic", "longrope"})
