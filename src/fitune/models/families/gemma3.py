"""Gemma 3's text models (arXiv:2503.19786): Gemma 2's layout without the caps."""

from dataclasses import replace

from fitune.models.families import gemma2

FAMILY = replace(gemma2.FAMILY, model_type="gemma3_text")
