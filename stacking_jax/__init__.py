"""stacking_jax: pretraining language models by growing their depth."""

__version__ = "0.1.0"
