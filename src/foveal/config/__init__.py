"""What a model is: `ModelConfig` read from a Hugging Face config.json. Imports no torch."""

from foveal.config.families.common import WeightNames
from foveal.config.model import ModelConfig
from foveal.config.read import read_config, weight_names

__all__ = ["ModelConfig", "WeightNames", "read_config", "weight_names"]
