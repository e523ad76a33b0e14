"""Memory: what a run will take, and what it took."""

from fitune.memory.measure import forget_peak, peak_mib, resident_mib

__all__ = ["forget_peak", "peak_mib", "resident_mib"]
