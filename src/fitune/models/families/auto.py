"""Any other causal LM: its parts by the names found in it.

In: a model. Out: a Family, or an error that says which part was not found. What was found is reported before the
first step; that flat batches are right is shown by the leak probe, as for every model.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.core.errors import ModelError
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM

OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "linear_out")
MLP_OUT = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "proj", "fc_2", "linear_2")
QUERIES = ("q_proj", "query")
RECURRENT = ("in_proj_qkvz", "in_proj_qkv")  # of layers with linear attention
VALUES = ("v_proj", "value", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")


def find(model: CausalLM) -> Family:
    """The parts of a causal LM by their names.

    Raises:
        ModelError: a part has no name that is known.
    """
    path, blocks = _blocks(model)
    block = blocks[0]
    if why := _partial(blocks):
        return _part_of(model, path, blocks, why)
    linear = [name for name, module in block.named_modules() if _is_linear(module)]
    parts = {name.split(".")[0] for name in linear}
    attention = next((name for name in sorted(parts) if "attn" in name or "attention" in name), None)
    if attention is None:
        raise _unknown(model, "the attention of a block", [name for name, _ in block.named_children()])
    inside = [name for name in linear if name.startswith(f"{attention}.")]
    outside = [name for name in linear if name not in inside]
    out = _pick(model, inside, OUT, "the attention's output layer")
    mlp_out = _pick(model, outside, MLP_OUT, "the MLP's output layer")
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
    experts = any(parameter.ndim > 2 and "conv" not in name for name, parameter in blocks.named_parameters())
    several = any(".experts." in name for name in names[0])
    differ = any(other != names[0] for other in names)
    reasons = [*(["are mixtures of experts"] if experts or several else []), *(["differ"] if differ else [])]
    return " and ".join(reasons)


def _part_of(model: CausalLM, path: str, blocks: nn.ModuleList, why: str) -> Family:
    """What can be said of such a model: its blocks, its norm, and which layers `targets: auto` means."""
    linear = [(name, _leaf(name)) for block in blocks for name, module in block.named_modules() if _is_linear(module)]
    attention = sorted({name.split(".")[0] for name, _ in linear if "attn" in name or "attention" in name})
    known = [leaf for leaf in (*QUERIES, *VALUES, *RECURRENT) if any(leaf == other for _, other in linear)]
    if not attention or not known:
        raise _unknown(model, "the attention of a block", sorted({leaf for _, leaf in linear}))
    return Family(
        model_type=model.config.model_type,
        blocks=path,
        attention=attention[-1],
        qkv=(),
        out="",
        mlp=None,
        mlp_in=(),
        mlp_out="",
        final_norm=_final_norm(model, path),
        lora_targets=tuple(known),
        found=True,
        partial=why,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _blocks(model: CausalLM) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one class, outermost first."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise _unknown(model, "the list of transformer blocks", [name for name, _ in model.named_children()])
    longest = max(len(module) for _, module in lists)
    return min(((n, m) for n, m in lists if len(m) == longest), key=lambda pair: pair[0].count("."))


def _final_norm(model: CausalLM, blocks: str) -> str:
    """The last norm beside the list of blocks."""
    parent = blocks.rpartition(".")[0]
    names = [
        name for name, module in model.get_submodule(parent).named_children() if "norm" in type(module).__name__.lower()
    ]
    if not names:
        raise _unknown(model, "the final norm", [name for name, _ in model.get_submodule(parent).named_children()])
    return f"{parent}.{names[-1]}" if parent else names[-1]


def _pick(model: CausalLM, names: list[str], known: tuple[str, ...], what: str) -> str:
    found = [name for leaf in known for name in names if _leaf(name) == leaf]
    if not found:
        raise _unknown(model, what, names)
    if Counter(map(_leaf, found))[_leaf(found[0])] > 1:
        raise _unknown(model, f"{what} (several are called so: a mixture of experts?)", names)
    return found[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _unknown(model: CausalLM, what: str, names: list[str]) -> ModelError:
    return ModelError(
        f"model type {model.config.model_type!r} is not in the table, and its names do not show {what}",
        received=", ".join(names[:12]),
        expected="a decoder of equal blocks, each with attention and one MLP",
        fix="this version cannot tune it",
    )
