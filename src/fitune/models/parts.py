"""What of a model is trainable, and how many parameters each of its parts has.

In: a model with its method on it. Out: names, parameters, counts.
"""

from __future__ import annotations

import re

from torch import nn

from fitune.models import families
from fitune.models import quant as quants
from fitune.models.family import Family
from fitune.models.interfaces import causal_lm


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order: those of `named_parameters`, which goes through a
    generator for each level of each module. A step asks, and 32 blocks with LoRA have thousands of modules."""
    found: dict[str, nn.Parameter] = {}
    seen: set[nn.Module] = set()
    taken: set[int] = set()
    there: list[tuple[str, nn.Module]] = [("", model)]
    while there:
        path, module = there.pop()
        if module in seen:
            continue
        seen.add(module)
        if module._parameters:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and id(parameter) not in taken:
                    taken.add(id(parameter))
                    found[path + name] = parameter
        if module._modules:
            inside = [(f"{path}{name}.", one) for name, one in module._modules.items() if one is not None]
            there += reversed(inside)
    return found


def groups(model: nn.Module, family: Family) -> list[tuple[str, int, int]]:
    """(name, trainable, total) parameters of each part: embedding, blocks one by one, norm, head, and what is new."""
    inner = causal_lm(model)
    prefix = next((name for name, module in model.named_modules() if module is inner), "")
    start = f"{prefix}." if prefix else ""
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    parts = {f"{paths[id(embedding)]}.": "embedding", f"{start}{family.final_norm}.": "final norm"}
    if head is not None:
        parts[f"{paths[id(head)]}."] = "head"
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        block = re.match(rf"{re.escape(start + family.blocks)}\.(\d+)\.", name)
        found = next((part for path, part in parts.items() if name.startswith(path)), name.split(".")[0])
        part = f"block {block[1]}" if block else found
        trained, total = counts.get(part, (0, 0))
        count = quants.numel(parameter)
        counts[part] = (trained + count * parameter.requires_grad, total + count)
    return [(part, trained, total) for part, (trained, total) in counts.items()]


def block_count(model: nn.Module) -> int:
    """How many transformer blocks a model has."""
    inner = causal_lm(model)
    return len(families.of(inner).block_list(inner))


def first_trained(model: nn.Module) -> int:
    """The number of the first block that the backward pass goes through: in it, or before it, something is trained. The
    number of blocks where only what comes behind them is."""
    inner = causal_lm(model)
    family = families.of(inner)
    head = inner.get_output_embeddings()
    behind = set() if head is None else {id(p) for p in head.parameters()}
    embedding = {id(p) for p in inner.get_input_embeddings().parameters()}
    first = len(family.block_list(inner))
    for name, parameter in trainable(model).items():
        found = re.search(rf"(?:^|\.){re.escape(family.blocks)}\.(\d+)\.", name)
        last = re.search(rf"(?:^|\.){re.escape(family.final_norm)}\.", name) or id(parameter) in behind - embedding
        if found is None and not last:
            return 0
        first = first if found is None else min(first, int(found[1]))
    return first
