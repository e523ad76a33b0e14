"""Where the tests run, beside where it was measured that rows have the same bits in all batches."""

from __future__ import annotations

from importlib import metadata

import torch

from fitune.commands import doctor


def than_measured(*names: str) -> str | None:
    """What is other here, as text: the processor (measured: AVX512 without AMX), versions of some packages (measured:
    those that fitune is tested with). None: nothing."""
    known = doctor.tested()
    there = {name: metadata.version(name).partition("+")[0] for name in names}
    found = [f"{name} {version}" for name, version in there.items() if version != known[name]]
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        found.append(torch.backends.cpu.get_cpu_capability())
    elif torch.cpu._is_amx_tile_supported():
        found.append("AMX")
    return ", ".join(found) or None
