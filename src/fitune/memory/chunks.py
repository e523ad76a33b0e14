"""Of how many label rows the logits are computed at once: few on a CPU, on a CUDA GPU as many as the plan has room for.

In: the settings of a run, its largest micro-batch. Out: the number. The head is read once forward and once backward for
each chunk; a GPU computes products of some hundred rows no faster than it reads the weight. The number decides in which
order a loss is summed, so it is fixed for a run and kept in its config: what is free later changes no bit. It follows
from the settings, the rows and the whole memory of the GPU; what others hold of it matters only where a plan would no
longer fit.
"""

from __future__ import annotations

from fitune.core.config import RunConfig
from fitune.memory.device import Device
from fitune.models.kernels.loss import chunk_rows
from fitune.models.kernels.target import Target

READS = 4  # how often the head is read, each way, for the largest micro-batch
MULTIPLE = 128  # of rows: whole tiles of a matrix product
ROOMY = 0.85  # share of a GPU's memory up to which a plan may grow for this
# Bytes for each logit, at most: its log-softmax in float32, where its gradient is made, and one of them as computed.
# Where one kernel writes the gradient over the logits it is what they take.
EACH = 8


def least(config: RunConfig, vocabulary: int, target: Target) -> int:
    """The number that was given, or the fewest for a device."""
    return chunk_rows(vocabulary, target) if config.loss_rows == "auto" else config.loss_rows


def most(config: RunConfig, vocabulary: int, target: Target, labels: int) -> int:
    """How many there would be if memory were no matter.

    Args:
        labels: label rows of the largest micro-batch.
    """
    fewest = least(config, vocabulary, target)
    if target.kind != "cuda" or config.loss_rows != "auto":
        return fewest
    return max(fewest, -(-labels // (READS * MULTIPLE)) * MULTIPLE)


def roomy(needed: int, where: Device) -> bool:
    """Is there room for so many bytes, and to spare?"""
    whole = where.total or where.budget
    return whole is not None and needed <= min(ROOMY * whole, where.budget or 0)
