"""GLM in transformers' own class, which ChatGLM2 and 3 map onto: gate and up in one layer, biases on q, k and v."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(llama.FAMILY, model_type="glm", mlp_in=("mlp.gate_up_proj",), bias_flags=())
