"""The tensors of a model folder by transformers' names, read one at a time.

In: a folder. Out: names, shapes, and each tensor when its turn comes. A file is opened for one tensor and closed again,
so that of a model in shards no more is in memory than what is being written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitune.models import weights
from fitune.models.configs import is_original
from fitune.models.families import original, towers
from fitune.models.weights import safe


class Source:
    """Tensors of a folder.

    Args:
        folder: of a model.
        config: its config, as transformers has it.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        self._held: dict[str, Tensor] = {}  # views of files that are mapped into memory
        if is_original(folder):
            self._held = dict(original.tensors(weights.tensors(folder), config))
        elif weights.is_bin(folder):
            held = weights.tensors(folder)
            self._held = dict(held if towers.of(folder) is None else towers.tensors(held))
        else:
            self._find(folder)

    def _find(self, folder: Path) -> None:
        whole = towers.of(folder)
        for file in weights.files(folder):
            for name in weights.names(file):
                known = name if whole is None else towers.language_name(name)
                if known is not None:
                    self._places[known] = (file, name)

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return [*self._places, *self._held]

    def shape(self, name: str) -> torch.Size:
        """Its sizes; the file's header has them."""
        if name in self._held:
            return self._held[name].shape
        file, key = self._places[name]
        with safe.opened(file) as tensors:
            return torch.Size(tensors.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor."""
        if name in self._held:
            return self._held[name]
        file, key = self._places[name]
        with safe.opened(file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor
