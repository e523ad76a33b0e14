"""What fitune must know of an architecture to tune it. The table of families is families/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fitune.core.errors import ConfigError
from fitune.models.interfaces import CausalLM


def _nothing(model: CausalLM) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Names of an architecture's parts, as they stand in its state dict.

    blocks, final_norm: paths from the causal-LM class. All others are paths from a block: attention and mlp are its
    modules (mlp None: its layers stand in the block itself), qkv and mlp_in the linear layers that read the hidden
    states, out and mlp_out those that write them. lora_targets: what `targets: auto` means, the attention projections
    that Hu et al. (2021) tuned. bias_flags: settings of the config that give every projection a bias, where it has
    some. make_flat: replaces what keeps an instance from running flat batches. found: by looking at the model. partial:
    why the blocks have no such parts in common (experts, blocks of several kinds); then only the names of blocks,
    attention and final norm are there, for methods that go by the layers' own names.
    """

    model_type: str
    blocks: str
    attention: str
    qkv: tuple[str, ...]
    out: str
    mlp: str | None
    mlp_in: tuple[str, ...]
    mlp_out: str
    final_norm: str
    lora_targets: tuple[str, ...]
    bias_flags: tuple[str, ...] = ()
    make_flat: Callable[[CausalLM], None] = _nothing
    found: bool = False
    partial: str = ""

    def whole(self, what: str) -> None:
        """Raises ConfigError where the blocks have not the parts that a method puts something on."""
        if self.partial:
            raise ConfigError(
                f"{what}: this model's blocks {self.partial}, so not each has the parts that it is put on",
                received=self.model_type,
                fix="--method lora (its attention, or --lora.targets all-linear), full, freeze or prompt",
            )

    def block_list(self, model: CausalLM) -> nn.ModuleList:
        """The transformer blocks of a causal LM."""
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def projections(self) -> tuple[str, ...]:
        """Every linear layer of a block."""
        return (*self.qkv, self.out, *self.mlp_in, self.mlp_out)

    def describe(self) -> str:
        """The names in one line."""
        if self.partial:
            return f"blocks {self.blocks}, which {self.partial}; final norm {self.final_norm}"
        parts = f"blocks {self.blocks}, attention {', '.join((*self.qkv, self.out))}"
        return f"{parts}, MLP {', '.join((*self.mlp_in, self.mlp_out))}, final norm {self.final_norm}"


@dataclass(frozen=True)
class Tower:
    """path: of the language model in transformers' class of the whole model; in the causal LM it is `model`. like: the
    causal LM that it equals, where transformers has no class for it alone."""

    path: str = "model.language_model"
    like: str | None = None
