"""`python -m fitune`."""

from fitune.cli.main import main

if __name__ == "__main__":
    main()
