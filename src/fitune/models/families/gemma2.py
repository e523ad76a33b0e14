"""Gemma 2 (arXiv:2408.00118): Llama's layout, four norms in a block, a window in every second, soft-capped scores."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(llama.FAMILY, model_type="gemma2", bias_flags=())
