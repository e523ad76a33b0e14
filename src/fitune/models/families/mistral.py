"""Mistral (arXiv:2310.06825): Llama's layout; a token sees a window of those before it."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(llama.FAMILY, model_type="mistral", bias_flags=())
