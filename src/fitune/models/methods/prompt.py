"""Prompt tuning: trained vectors before the input (Lester et al. 2021, arXiv:2104.08691).

In: a model. Out: the model as PEFT wraps it. The vectors begin as tokens of the vocabulary, as a text's, or at random
with the spread of the embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PromptTuningConfig, get_peft_model

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.data import tokenizer
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Peft
from fitune.models.methods.virtual import ENCODER, VirtualTokens


class Prompt(VirtualTokens):
    """See the module's text."""

    name = "prompt"
    trains = "virtual tokens before the input"
    options = "prompt"
    default_lr = 3e-2
    why_lr = "a handful of vectors must travel far (Lester et al. 2021: 0.3 with Adafactor; Adam needs less)"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        options, embedding = config.prompt, model.get_input_embeddings()
        start = _start(embedding, config)
        wrapped: Peft = get_peft_model(
            model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.tokens)
        )
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.copy_(start)
        return wrapped

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """tokens x width."""
        return {f"{ENCODER}.embedding.weight": config.prompt.tokens * model.get_input_embeddings().weight.shape[1]}

    def check(self, config: RunConfig) -> None:
        """A text is needed for init=text, and only there."""
        if (config.prompt.init == "text") != bool(config.prompt.text.strip()):
            raise ConfigError(
                "prompt.init=text and prompt.text belong together",
                received=f"init {config.prompt.init}, text {config.prompt.text!r}",
                fix="--prompt.init text --prompt.text '...'",
            )


def _start(embedding: torch.nn.Embedding, config: RunConfig) -> torch.Tensor:
    """The first values of the virtual tokens: (tokens, W), float32."""
    options = config.prompt
    if options.init == "random":
        spread = float(embedding.weight.float().std())
        return torch.randn(options.tokens, embedding.weight.shape[1]) * spread
    if options.init == "vocab":
        ids = torch.randint(0, embedding.weight.shape[0], (options.tokens,))
    else:
        loaded = tokenizer.load(Path(config.model))
        found = tokenizer.encode(loaded, options.text, literal=False)
        if len(found) > options.tokens:
            raise ConfigError(
                "prompt.text has more tokens than there are virtual ones",
                received=f"{len(found)} tokens",
                expected=f"at most {options.tokens} (prompt.tokens)",
                fix=f"--prompt.tokens {len(found)}",
            )
        ids = torch.tensor((found * -(-options.tokens // len(found)))[: options.tokens])
    return embedding.weight[ids.to(embedding.weight.device)].detach().float()


METHOD = Prompt()
