"""ChatGLM-6B, version 1, as a transformers model (GLM: Du et al. 2022, arXiv:2103.10360).

Its prompt attends both ways and its answer causally; positions have two rows. Before the first <sop> a token has its
place and block position 0. From a <sop> on, a token has the place of the [MASK] (or [gMASK]) that it fills in, and
block positions 1, 2, ... A token sees what is before it, and everything with block position 0. Half of each head is
rotated by the place, half by the block position. A block ends in alpha x (what its norm gave) + its layer, where alpha
is the root of 2 x 28.

Names and shapes are those of the published checkpoints. In: ids, from which positions follow; or embeddings with
positions. Flat batches: `cu_seq_lens_q`, as in kernels/attention.py.

Shapes: B rows, T tokens, S = T + past, H heads, E head width, W = H x E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from fitune.models.families.chatglm_attention import Prefix, Rotary, SelfAttention, see_their_prompts
from fitune.models.kernels import apart
from fitune.models.kernels.flash import Documents
from fitune.models.kernels.label_rows import LabelRows

LAYERS = 28  # those of the published model: its code reckons with them whatever num_layers is


class ChatGLMConfig(PreTrainedConfig):
    """The settings of config.json, by their published names."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int = 3
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    position_encoding_2d: bool = True
    apply_residual_connection_post_layernorm: bool = True  # of a block's sum: no block can be the identity

    def __post_init__(self, **kwargs: Any) -> None:
        """Whatever a file says of its positions: they have two rows in this model."""
        self.position_encoding_2d = True
        super().__post_init__(**kwargs)


def positions_of(ids: NDArray[np.integer], config: ChatGLMConfig) -> NDArray[np.int64]:
    """(2, T): places and block positions of one document. Text without a <sop> is one answer to an empty prompt."""
    starts = np.flatnonzero(ids == config.bos_token_id)
    context = int(starts[0]) if len(starts) else 0
    place, block = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    whole, spans = (np.flatnonzero(ids[:context] == i) for i in (config.gmask_token_id, config.mask_token_id))
    filled = whole[:1] if len(whole) else spans if len(spans) else np.array([max(0, context - 1)])
    starts = starts if len(starts) else np.array([0])
    for number, (start, end) in enumerate(pairwise([*starts.tolist(), len(ids)])):
        place[start:end] = filled[min(number, len(filled) - 1)]
        block[start:end] = np.arange(1, end - start + 1)
    return np.stack([place, block]).astype(np.int64)


def _laid_after(positions: NDArray[np.int64], before: int) -> NDArray[np.int64]:
    """The same behind so many virtual tokens, which belong to the prompt."""
    virtual = np.stack([np.arange(before), np.zeros(before, np.int64)])
    return np.concatenate([virtual, positions + np.array([[before], [0]])], axis=1)


class MLP(nn.Module):
    """(..., W) to (..., W)."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """GELU by tanh between two layers."""
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class GLMBlock(GradientCheckpointingLayer):
    """(B, T, W) to (B, T, W)."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * LAYERS)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *how: Any, **more: Any) -> Tensor:
        """See the module's text."""
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(x * self.alpha + self.attention(x, *how, **more))
        out: Tensor = x * self.alpha + self.mlp(x)
        return out


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers must know."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def set_attn_implementation(self, attn_implementation: str, **kwargs: Any) -> None:
        """One attention serves every layout: it goes by what forward() is given."""
        self.config._attn_implementation = attn_implementation


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Ids to last hidden states."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads // 2)
        self.layers = nn.ModuleList([GLMBlock(config, n) for n in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        # PEFT lays virtual tokens before a prompt as embeddings and drops positions: what it embedded last, the
        # positions that generate() asked for, and how many virtual tokens there were, are remembered for it
        self.seen: Tensor | None = None
        self.asked: Tensor | None = None
        self.laid = 0
        self.word_embeddings.register_forward_hook(self._see)
        self.post_init()

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = inputs[0]

    def get_input_embeddings(self) -> nn.Module:
        """See PreTrainedModel."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """See PreTrainedModel."""
        self.word_embeddings = value  # type: ignore[assignment]  # PEFT puts other kinds of layers there
        value.register_forward_hook(self._see)

    def positions(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, (B, T) 1 where a token is real, to (B, 2, T). Padding, on either side, has position 0."""
        rows = ids.cpu().numpy()
        real = np.ones_like(rows, bool) if mask is None else mask.bool().cpu().numpy()
        found = np.zeros((rows.shape[0], 2, rows.shape[1]), np.int64)
        for number, (row, keep) in enumerate(zip(rows, real, strict=True)):
            found[number][:, keep] = positions_of(row[keep], self.config)
        return torch.from_numpy(found).to(ids.device)

    def flat_positions(self, ids: Tensor, bounds: Sequence[int], before: int = 0) -> Tensor:
        """(T,) ids of documents side by side to (2, T + documents x before), with `before` virtual tokens in front.
        A document that shares its prompt with another one is whole here."""
        row = ids.cpu().numpy()
        made = [_laid_after(positions_of(row[start:end], self.config), before) for start, end in pairwise(bounds)]
        return torch.from_numpy(np.concatenate(made, axis=1)).to(ids.device)

    def _allowed(self, positions: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """(B, 1, T, S): True where a token sees another."""
        if mask is not None and mask.ndim == 4:  # the original's: True where it does not
            return ~mask.bool()
        length = positions.shape[-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        allowed = seen[None] | (positions[:, 1] == 0)[:, None]  # (B, T, T)
        allowed = F.pad(allowed, (past, 0), value=True)
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, -allowed.shape[-1] :]
            itself = torch.eye(length, dtype=torch.bool, device=mask.device)
            allowed = allowed | F.pad(itself, (past, 0))  # padding too: a softmax over nothing would be NaN
        return allowed[:, None]

    def _flat_allowed(
        self, positions: Tensor, parts: Sequence[apart.Part], before: int, x: Tensor
    ) -> list[Tensor | None]:
        """Of each document (rows, before + keys): as above, and all of a prefix, and of a prompt that it shares. Rows
        behind it are no prompt. None: it has none of its own, so a token sees what is before it."""
        made: list[Tensor | None] = []
        prompts = positions[1].cpu().numpy() == 0
        for part in parts:
            if not prompts[part.first : part.end].any():
                made.append(None)
                continue
            count, keys = apart.sizes(part, x)
            seen = torch.ones(count, count, dtype=torch.bool, device=positions.device).tril()
            prompt = F.pad(positions[1, part.first : part.end] == 0, (0, count - part.count))
            whole = F.pad(seen | prompt[None], (before + part.shared, 0), value=True)
            made.append(F.pad(whole, (0, keys - part.shared - count), value=False))
        return made

    def _missing_positions(self, ids: Tensor | None, x: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """(B, 2, T), where nobody gave them."""
        mask = mask if mask is not None and mask.ndim == 2 else None
        length = x.shape[1]
        if ids is None:
            if self.seen is None or self.seen.shape[1] > length:
                raise ValueError("inputs_embeds need position_ids (B, 2, T)")
            self.laid = length - self.seen.shape[1]
            found = self.positions(self.seen, None if mask is None else mask[:, -self.seen.shape[1] :])
            rows = [_laid_after(row, self.laid) for row in found.cpu().numpy()]
            return torch.from_numpy(np.stack(rows)).to(x.device)
        if past and self.asked is not None and length < self.asked.shape[-1]:
            return self.asked[..., -length:] + torch.tensor([[self.laid], [0]], device=x.device)
        self.laid = 0
        return self.positions(ids, None if mask is None else mask[:, -length:])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        prefix: Prefix | None = None,
        documents: Documents | None = None,
        label_rows: object = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See the module's text.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 1 where a token is real; or (B, 1, T, S), True where one does not see another.
            position_ids: (B, 2, T). Left out, they follow from the ids.
            past_key_values: a cache.
            inputs_embeds: (B, T, W) in place of ids.
            use_cache: keep keys and values.
            cu_seq_lens_q: (D + 1,) bounds of the documents of a flat batch, B = 1.
            prefix: of each layer keys and values (1, H, k, E) before every document.
            documents: the same documents, with what they share.
            label_rows: of a flat batch, those that the last block works on (kernels/last_block.py).
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self._missing_positions(input_ids, x, attention_mask, past)
        shared = None if documents is None else documents.shared
        parts = None if cu_seq_lens_q is None else apart.whole(cu_seq_lens_q.tolist(), shared)
        allowed: Sequence[Tensor | None]
        if parts is None:
            allowed = [self._allowed(position_ids, attention_mask, past)]
        else:
            allowed = self._flat_allowed(position_ids[0], parts, 0 if prefix is None else prefix[0][0].shape[2], x)
        how = (allowed, parts, prefix, past_key_values)
        angles, by_rows = self.rotary(position_ids, x.dtype), label_rows
        if isinstance(label_rows, LabelRows) and not see_their_prompts(label_rows, position_ids[0, 1]):
            by_rows = None
        for layer in self.layers:
            x = layer(x, *how, position_embeddings=angles, label_rows=by_rows)
        if isinstance(label_rows, LabelRows) and by_rows is None:
            x = x.index_select(1, label_rows.rows)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(x), past_key_values=past_key_values)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """Ids to logits; generates."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """See PreTrainedModel."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """See PreTrainedModel."""
        self.lm_head = value  # type: ignore[assignment]  # PEFT puts other kinds of layers there

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ChatGLMModel; labels (B, T) with -100 where there is none give the mean loss per label."""
        out = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that are new to the cache, with their positions, which follow from all ids."""
        started = past_key_values is not None and past_key_values.get_seq_length() > 0
        here = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        positions = self.transformer.positions(input_ids, here)
        self.transformer.asked = positions
        if started:
            input_ids, positions = input_ids[:, -1:], positions[..., -1:]
        return {
            "input_ids": input_ids,
            "position_ids": positions,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }


AutoConfig.register("chatglm", ChatGLMConfig)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
