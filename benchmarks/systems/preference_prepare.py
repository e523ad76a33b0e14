"""What both systems of `preference.py` begin with: the model and the adapter of `prepare.py`, and no rows."""

from __future__ import annotations

from pathlib import Path

import meter as meters
import prepare


def main() -> None:
    """Write them."""
    settings = meters.settings()
    prepare.make_model(settings, Path(settings["work"]))


if __name__ == "__main__":
    main()
