"""Raw rows to samples and batches: readers, formats, templates, tokenizers, encoding, the cache. No torch at import."""
