"""Small studies of theory, without text: in-context linear regression (`stacking-jax lab icl`)."""

from stacking_jax.lab.command import icl
from stacking_jax.lab.settings import IclSettings, quick

__all__ = ["IclSettings", "icl", "quick"]
