"""The `fitune` command, also as `python -m fitune`."""

import atexit

from fitune.core import quiet
from fitune.core.imports import loading
from fitune.core.processor import start_anew


def main() -> None:
    """Set the heap, which takes a new start, and do what was asked."""
    start_anew()
    atexit.register(quiet.at_the_end)  # the first that is registered is the last that is called
    with loading():
        from fitune.cli.main import main

    main()


if __name__ == "__main__":
    main()
