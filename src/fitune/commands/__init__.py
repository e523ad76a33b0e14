"""One file for each verb: what it does, without how it is typed or shown."""
