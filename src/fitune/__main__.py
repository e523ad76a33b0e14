"""The `fitune` command, also as `python -m fitune`."""

from fitune.core.processor import start_anew


def main() -> None:
    """Set the heap, which takes a new start, and do what was asked."""
    start_anew()
    from fitune.cli.main import main

    main()


if __name__ == "__main__":
    main()
