"""Qwen 1.5, 2 and 2.5 (arXiv:2407.10671): Llama's layout with biases on q, k and v."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(llama.FAMILY, model_type="qwen2", bias_flags=())
