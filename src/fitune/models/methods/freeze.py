"""Freezing: only the last blocks, the last tensors, or what patterns name is trained.

In: a model. Out: the same, partly trainable. Nothing below the first trainable block needs a gradient, so the backward
pass stops there.
"""

from __future__ import annotations

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, Quantized, head_names, matching, train_only, trains_quantized
from fitune.models.methods.new_tokens import NAME as NEW_ROWS


class Freeze(Method):
    """See the module's text."""

    name = "freeze"
    trains = "the last blocks (freeze.blocks), tensors or patterns; head and final norm if wanted"
    options = "freeze"
    default_lr = 5e-5
    why_lr = "whole weights move, but few of them: between full tuning and LoRA"

    def check(self, config: RunConfig) -> None:
        """Blocks, tensors and patterns are three ways to say the same thing."""
        options = config.freeze
        given = [
            *(["blocks"] if "blocks" in options.model_fields_set and options.blocks != 2 else []),
            *(["tensors"] if options.tensors is not None else []),
            *(["patterns"] if options.patterns else []),
        ]
        if len(given) > 1:
            raise ConfigError(f"freeze: {' and '.join(given)} are given", expected="one of blocks, tensors, patterns")

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        train_only(model, self.expected(model, family, config))
        return model

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """The parameters of what the settings name.

        Raises:
            ConfigError: more blocks or tensors than there are, a pattern that matches nothing, or nothing at all.
        """
        options = config.freeze
        sizes = {name: p.numel() for name, p in model.named_parameters() if not name.endswith(f".{NEW_ROWS}")}
        names = list(sizes)
        if options.patterns:
            chosen = set(matching(names, options.patterns, "freeze.patterns"))
        elif options.tensors is not None:
            if options.tensors > len(names):
                raise ConfigError("freeze.tensors: more than there are", received=options.tensors, expected=len(names))
            chosen = set(names[-options.tensors :])
        else:
            there = len(family.block_list(model))
            if options.blocks > there:
                raise ConfigError("freeze.blocks: more than there are", received=options.blocks, expected=there)
            last = tuple(f"{family.blocks}.{n}." for n in range(there - options.blocks, there))
            chosen = {name for name in names if name.startswith(last)} if last else set()
        if options.norm:
            chosen |= {name for name in names if name.startswith(f"{family.final_norm}.")}
        if options.head:
            chosen |= set(head_names(model, "freeze.head"))
        if not chosen:
            raise ConfigError("freeze: nothing would be trained", fix="freeze.blocks=2, or freeze.head=true")
        return {name: sizes[name] for name in names if name in chosen}

    def quant_problem(self, model: CausalLM, family: Family, config: RunConfig, quantized: Quantized) -> str | None:
        """Norms, head and embedding may be trained, the weights of quantized layers not."""
        return trains_quantized(self.expected(model, family, config), quantized)


METHOD = Freeze()
