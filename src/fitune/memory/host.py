"""Main memory beside a GPU, in a trace: what waits there is not the GPU's, and is counted apart.

In: the tracer of a piece of work, and where it is to run. Out: a Host for the model's blocks (models/offload.py), whose
`most` is what they have there at most. torch's allocator of pinned memory hands out powers of two
(aten/src/ATen/core/CachingHostAllocator.h), and keeps what is given back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitune.memory.shadow import Shadow
from fitune.memory.trace import Tracer
from fitune.models.offload import Host


class PaperHost(Host):
    """See the module's text.

    Args:
        tracer: of the work.
        apart: main memory is apart from the device; on a CPU it is the device's own, and is counted as that.
    """

    def __init__(self, tracer: Tracer, *, apart: bool) -> None:
        self.tracer, self.apart = tracer, apart
        self.now = 0

    def storage(self, tensor: Tensor) -> torch.UntypedStorage:
        """Of a shadow, that of what is inside it: each of its views is a shadow of its own."""
        return (tensor.meta if isinstance(tensor, Shadow) else tensor).untyped_storage()

    def put(self, flat: Tensor) -> Any:
        """Bytes in main memory, or a copy beside."""
        return _Pinned(self, flat) if self.apart else super().put(flat)

    def get(self, kept: Any, like: Tensor) -> Tensor:
        """Memory of the device again."""
        return like.new_empty(kept.count) if self.apart else super().get(kept, like)


class _Pinned:
    """Numbers of a storage in main memory, while this object lives."""

    def __init__(self, host: PaperHost, flat: Tensor) -> None:
        self.host, self.count = host, flat.numel()
        self.bytes = 1 << (self.count * flat.element_size() - 1).bit_length()
        host.now += self.bytes
        host.tracer.host_most = max(host.tracer.host_most, host.now)

    def __del__(self) -> None:
        self.host.now -= self.bytes
