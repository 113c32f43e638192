"""The decoder, its stack of layers, losses and decoding."""

from stacking_jax.models.config import DecoderConfig
from stacking_jax.models.decoder import Decoder
from stacking_jax.models.layer_stack import LAYOUT, LayerStack

__all__ = ["LAYOUT", "Decoder", "DecoderConfig", "LayerStack"]
