"""New tokens beside any method: only their rows are trained, in the embedding and in the output head.

In: a model, the ids of the tokens. Out: the same model, whose embedding gives a trained row for these ids and whose
head scores them with a trained row; every other row stays frozen, bit for bit. The rows are float32 parameters of their
own (`new_rows` of the embedding; of the head too, where that is not the embedding itself), laid over the frozen weights
by forward hooks, so names, PEFT's files and quantized weights are not touched.

Shapes: n = new tokens, W = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fitune.data.tokenizer.new_tokens import NewToken
from fitune.models import attached
from fitune.models.interfaces import CausalLM, Layer
from fitune.models.kernels.frozen import keep_stored

NAME = "new_rows"


@torch.no_grad()
def add_rows(model: CausalLM, tokens: Sequence[NewToken]) -> None:
    """Lay a row for each token over the embedding and the head of a causal LM."""
    highest = max(token.id for token in tokens)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    there = embedding.weight.shape[0]
    if highest >= there:
        model.resize_token_embeddings(highest + 1, mean_resizing=False)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for module in (embedding, head):
            module.weight[there:] = 0  # they only need to be there; at random they would differ from run to run
        if attached.of(model).compute == torch.float32:
            keep_stored(model, torch.float32)  # what was made anew has forgotten how it computes
    ids = torch.tensor([token.id for token in tokens], device=embedding.weight.device)
    for module in (embedding,) if tied else (embedding, head):
        mean = [module.weight[list(token.pieces)].float().mean(dim=0) for token in tokens]
        module.register_parameter(NAME, nn.Parameter(torch.stack(mean)))
    if tied:
        head.register_parameter(NAME, getattr(embedding, NAME))
    for layer in (cast(Layer, embedding), cast(Layer, head)):
        layer.new_ids, layer.new_rows_on, layer.rows_before = ids, True, there
    some = torch.arange(min(8, there), device=ids.device)
    # some models scale what comes out of their embedding, by the square root of the width for example
    cast(Layer, embedding).new_scale = float(embedding(some).float().norm() / embedding.weight[some].float().norm())
    embedding.register_forward_hook(_embed)
    head.register_forward_hook(_score)


def _embed(module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not module.new_rows_on:
        return output
    place = inputs[0][..., None] == module.new_ids  # (..., n)
    rows = (module.new_rows * module.new_scale)[place.int().argmax(dim=-1)].to(output.dtype)
    return torch.where(place.any(dim=-1, keepdim=True), rows, output)


def _score(module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not module.new_rows_on:
        beyond = module.new_ids[module.new_ids >= module.rows_before]  # the base has no such token
        return output.index_fill(-1, beyond, float("-inf"))
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias[module.new_ids]
    scores = nn.functional.linear(inputs[0].to(module.new_rows.dtype), module.new_rows, bias)
    return output.index_copy(-1, module.new_ids, scores.to(output.dtype))


def _layers(model: CausalLM) -> list[Layer]:
    """The embedding and the head, where rows were laid over them; a tied head comes second."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [cast(Layer, module) for module in both if hasattr(module, NAME)]


def rows(model: CausalLM) -> dict[str, Tensor]:
    """The trained rows of a causal LM: `embedding`, and `head` where it has its own."""
    layers = _layers(model)
    own = layers[:1] if len(layers) < 2 or layers[0].new_rows is layers[1].new_rows else layers
    return dict(zip(("embedding", "head"), (layer.new_rows for layer in own), strict=False))


def ids(model: CausalLM) -> list[int]:
    """Ids of the tokens whose rows are trained."""
    layers = _layers(model)
    return [int(i) for i in layers[0].new_ids] if layers else []


def train_rows(model: CausalLM) -> dict[str, int]:
    """Make the rows trainable, whatever a method froze; their sizes by `embedding` and `head`."""
    for parameter in rows(model).values():
        parameter.requires_grad_(True)
    return {name: parameter.numel() for name, parameter in rows(model).items()}


def turn(model: CausalLM, *, on: bool) -> None:
    """With or without the rows: the base has none."""
    for layer in _layers(model):
        layer.new_rows_on = on


@torch.no_grad()
def write_in(model: CausalLM) -> None:
    """Write the rows into the weights themselves; the model is a plain one afterwards."""
    for layer in _layers(model):
        layer.weight[layer.new_ids] = layer.new_rows.to(layer.weight.dtype)
    for layer in _layers(model):
        for key, hook in list(layer._forward_hooks.items()):
            if hook in (_embed, _score):
                del layer._forward_hooks[key]
        delattr(layer, NAME)
