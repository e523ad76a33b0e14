"""Fused paths: attention over flat batches, and the loss that never holds all logits."""
