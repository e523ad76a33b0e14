"""Memory: what a run will take, and what it took."""

from fitune.memory.estimate import Estimate, estimate
from fitune.memory.measure import peak_mib, resident_mib

__all__ = ["Estimate", "estimate", "peak_mib", "resident_mib"]
