"""GLM-4-0414: GLM's layout with a norm behind attention and MLP too."""

from dataclasses import replace

from fitune.models.families import glm

FAMILY = replace(glm.FAMILY, model_type="glm4")
