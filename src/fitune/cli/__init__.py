"""The command line: parses what is typed, calls a command, prints."""
