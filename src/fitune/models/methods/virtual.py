"""Virtual tokens: what prompt-, P- and prefix-tuning share, and how each document of a flat batch gets its own.

In: a model as PEFT wraps it. Out: what stands before each document, made once for a whole batch. PEFT's own forward
puts them before each row of a padded batch; in a flat batch it would put them before the first document alone.

Shapes: k = virtual tokens, W = width, K = key heads, E = head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftType
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.models import attached
from fitune.models.interfaces import Peft, peft_of
from fitune.models.methods.base import Method

ENCODER = "prompt_encoder.default"


class VirtualTokens(Method):
    """A method that puts trained tokens before the input; `options` has their number."""

    cannot_merge = "it adds tokens, and no weight of the base changes"
    same_at_start = False

    def virtual_tokens(self, config: RunConfig) -> int:
        """See Method.virtual_tokens."""
        return int(getattr(config, str(self.options)).tokens)


def in_float32(wrapped: Peft) -> Peft:
    """The model whose encoder of virtual tokens computes in float32 whatever the rest does: what PEFT saves is computed
    so, and not every processor has an LSTM in bf16."""
    encoder = wrapped.prompt_encoder["default"]
    before: list[tuple[str, bool]] = []

    def enter(*_: object) -> None:
        kind = next(encoder.parameters()).device.type
        before.append((kind, torch.is_autocast_enabled(kind)))
        torch.set_autocast_enabled(kind, False)

    def leave(*_: object) -> None:
        torch.set_autocast_enabled(*before.pop())

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(leave, always_call=True)
    return wrapped


@dataclass(frozen=True)
class Virtual:
    """embeddings: (k, W), before the input; or prefix: of each layer keys and values, (1, K, k, E)."""

    count: int
    embeddings: Tensor | None = None
    prefix: list[tuple[Tensor, Tensor]] | None = None


def of(model: nn.Module) -> Virtual | None:
    """What stands before each document; None where nothing does."""
    peft = peft_of(model)
    if peft is None or not peft._is_prompt_learning or attached.of(model).disabled:
        return None
    config = peft.active_peft_config
    made = _encoded(peft)
    if config.peft_type != PeftType.PREFIX_TUNING:
        return Virtual(config.num_virtual_tokens, embeddings=made)
    layers, heads = config.num_layers, config.num_attention_heads
    by_layer = made.view(config.num_virtual_tokens, 2 * layers, heads, -1)
    split = by_layer.permute(1, 2, 0, 3)[:, None].unbind()  # 2 x layers times (1, K, k, E)
    return Virtual(config.num_virtual_tokens, prefix=list(zip(split[::2], split[1::2], strict=True)))


def _encoded(model: Peft) -> Tensor:
    """(k, ...): what the encoder gives, or where PEFT loaded it for inference, what it gave."""
    encoder = model.prompt_encoder[model.active_adapter]
    if model.active_peft_config.inference_mode:
        weight: Tensor = encoder.embedding.weight
        return weight
    tokens = model.prompt_tokens[model.active_adapter].to(encoder.embedding.weight.device)
    out: Tensor = encoder(tokens[None, : model.active_peft_config.num_virtual_tokens])[0]
    return out
