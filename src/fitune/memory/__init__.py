"""Memory: what a run will take, and what it took."""

from fitune.memory.measure import peak_mib, resident_mib

__all__ = ["peak_mib", "resident_mib"]
