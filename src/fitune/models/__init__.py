"""Base models: loading, families, methods, quantizers, kernels, weights, adapters."""
