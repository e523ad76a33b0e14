"""Qwen3 (arXiv:2505.09388): Llama's layout, queries and keys normalised by head."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(llama.FAMILY, model_type="qwen3", bias_flags=())
