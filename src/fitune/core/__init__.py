"""Config, records, errors, files, locks: what every room stands on. Nothing here imports torch."""
