"""Models: the decoder, and how checkpoints become one."""

from foveal.models.decoder import Decoder, Options, Output
from foveal.models.load import load_model

__all__ = ["Decoder", "Options", "Output", "load_model"]
