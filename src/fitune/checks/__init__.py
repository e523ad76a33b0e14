"""Every rule that can warn or refuse: on data, models, batches, runs."""
