"""Any other causal LM: its parts by how it is built.

In: a model. Out: a Family. The blocks are the list of modules that has most of the parameters, attention and MLP what
every block has of the kind; their output layers are known by usual names, or by their widths. What was found is
reported before the first step; that flat batches are right is shown by the leak probe, as for every model.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.core.errors import ModelError
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM

OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "linear_out", "attention_out", "output")
MLP_OUT = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "proj", "fc_2", "linear_2", "w_out")
QUERIES = ("q_proj", "query", "project_q", "Wq", "q_a_proj", "q_b_proj", "q_gate_proj", "q")
VALUES = (
    "v_proj", "value", "project_v", "Wv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_a_proj_with_mqa",
    "kv_b_proj", "kv_proj", "v",
)  # fmt: skip
# of layers that carry a state from token to token
RECURRENT = ("in_proj_qkvz", "in_proj_qkv", "in_proj", "linear_x")
MIXES = re.compile(r"att|mixer|mamba|conv|temporal|lstm|transf", re.IGNORECASE)  # names of what joins tokens
FEEDS = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)  # and of what works on each alone
CHOOSES = re.compile(r"indexer|compressor")  # parts of attention that choose keys, and learn in their own way
SHARED = re.compile(r"(^|\.)shared_(experts?|mlp)\.")
EXPERTS = "are mixtures of experts"
NORM = re.compile(r"norm(?!ed)|^ln_", re.IGNORECASE)
NOT_FINAL = re.compile(r"per_layer")  # of a norm's name


def find(model: CausalLM) -> Family:
    """The parts of a causal LM.

    Raises:
        ModelError: it has no list of blocks, or no linear layer in them.
    """
    path, blocks = _blocks(model)
    block = blocks[0]
    if why := _partial(blocks):
        return _part_of(model, path, blocks, why)
    linear = [name for name, module in block.named_modules() if _is_linear(module)]
    mixing = _mixing(linear)
    attention = mixing[0] if len(mixing) == 1 and "att" in mixing[0].lower() else None
    inside = [name for name in linear if name.split(".")[0] == attention]
    outside = [name for name in linear if name not in inside]
    out, mlp_out = _out(block, inside, OUT), _out(block, outside, MLP_OUT)
    if attention is None or out is None or mlp_out is None:
        return _part_of(model, path, blocks, "have parts by other names")
    qkv = tuple(name for name in inside if name != out)
    values = [_leaf(name) for name in qkv if _leaf(name) in VALUES]
    queries = [_leaf(name) for name in qkv if _leaf(name) in QUERIES]
    return Family(
        model_type=model.config.model_type,
        blocks=path,
        attention=attention,
        qkv=qkv,
        out=out,
        mlp=mlp_out.rpartition(".")[0] or None,
        mlp_in=tuple(name for name in outside if name != mlp_out),
        mlp_out=mlp_out,
        final_norm=_final_norm(model, path),
        lora_targets=tuple(dict.fromkeys([*queries, *values])) or tuple(map(_leaf, qkv)),
        found=True,
    )


def _partial(blocks: nn.ModuleList) -> str:
    """Why these blocks have no one MLP and no one attention in common; empty where they do."""
    names = [{name for name, module in block.named_modules() if _is_linear(module)} for block in blocks]
    experts = any(_of_experts(name, parameter) for name, parameter in blocks.named_parameters())
    differ = any(other != names[0] for other in names)
    reasons = [*([EXPERTS] if experts else []), *(["differ"] if differ else [])]
    return " and ".join(reasons)


def _of_experts(name: str, parameter: nn.Parameter) -> bool:
    """Is it a matrix of one expert, or a stack of matrices, one for each?"""
    stacked = parameter.ndim > 2 and parameter.shape[0] > 1 and FEEDS.search(name) is not None
    return stacked or ".experts." in name


def _part_of(model: CausalLM, path: str, blocks: nn.ModuleList, why: str) -> Family:
    """What can be said of such a model: its blocks, its norm, and which layers `targets: auto` means."""
    linear = _own_linear(blocks)
    if not linear:
        raise _unknown(model, "a linear layer in its blocks", [name for name, _ in blocks[0].named_children()])
    mixing = _mixing(linear)
    inside = [name for name in linear if (not mixing or _part(name) in mixing) and not CHOOSES.search(name)] or linear
    found = {leaf: [name for name in inside if _leaf(name) == leaf] for leaf in map(_leaf, inside)}
    known = [leaf for leaf in (*QUERIES, *VALUES, *RECURRENT) if leaf in found]
    leaves = known or [leaf for leaf in found if leaf not in (*OUT, *MLP_OUT)] or list(found)
    targets = [[leaf] if _all_of(leaf, found[leaf], linear) else found[leaf] for leaf in leaves]
    if EXPERTS in why:
        targets.append([name for name in linear if SHARED.search(name)])  # every token goes through these
    return Family(
        model_type=model.config.model_type,
        blocks=path,
        attention=mixing[-1] if mixing else "",
        qkv=(),
        out="",
        mlp=None,
        mlp_in=(),
        mlp_out="",
        final_norm=_final_norm(model, path),
        lora_targets=tuple(name for names in targets for name in names),
        found=True,
        partial=why,
    )


def _own_linear(blocks: nn.ModuleList) -> list[str]:
    """Names of the linear layers in blocks, without those whose weight is another block's too: what each of these would
    learn cannot be merged into the one."""
    all_ = [(name, module) for block in blocks for name, module in block.named_modules() if _is_linear(module)]
    times = Counter(id(module.weight) for _, module in all_)
    return list(dict.fromkeys(name for name, module in all_ if times[id(module.weight)] == 1))


def _all_of(leaf: str, names: list[str], linear: list[str]) -> bool:
    """Does a last name mean these layers and no others?"""
    return sum(_leaf(name) == leaf for name in linear) == len(names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _mixing(linear: list[str]) -> list[str]:
    """The parts of blocks in which tokens see each other, by name."""
    return sorted({part for name in linear if MIXES.search(part := _part(name)) and not FEEDS.search(part)})


def _part(name: str) -> str:
    return name.split(".")[0]


def _blocks(model: CausalLM) -> tuple[str, nn.ModuleList]:
    """The list of modules with most of the parameters; of such lists inside each other the outermost."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for _, module in lists]
    if not any(sizes):
        raise _unknown(model, "the list of transformer blocks", [name for name, _ in model.named_children()])
    return lists[sizes.index(max(sizes))]


def _final_norm(model: CausalLM, blocks: str) -> str:
    """The last norm beside the list of blocks, or beside what holds it; empty where there is none."""
    parent = blocks
    while parent:
        parent = parent.rpartition(".")[0]
        children = model.get_submodule(parent).named_children()
        norms = [name for name, module in children if NORM.search(type(module).__name__) or NORM.search(name)]
        names = [name for name in norms if not NOT_FINAL.search(name)]
        if names:
            return f"{parent}.{names[-1]}" if parent else names[-1]
    return ""


def _out(block: nn.Module, names: list[str], known: tuple[str, ...]) -> str | None:
    """The one layer that writes the hidden states: by its name, or the last one as wide as they are."""
    found = [name for leaf in known for name in names if _leaf(name) == leaf]
    if found:
        return found[0] if Counter(map(_leaf, found))[_leaf(found[0])] == 1 else None
    widths = {name: _width(block.get_submodule(name)) for name in names}
    wide = [name for name in names if widths[name][1] == min(width[0] for width in widths.values())]
    return wide[-1] if wide and len(names) > 1 else None


def _width(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return layer.nx, layer.nf


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _unknown(model: CausalLM, what: str, names: list[str]) -> ModelError:
    return ModelError(
        f"model type {model.config.model_type!r}: how it is built does not show {what}",
        received=", ".join(names[:12]),
        expected="a list of blocks, with linear layers in them",
        fix="this version cannot tune it",
    )
