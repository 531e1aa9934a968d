"""Image GPT (Chen et al., 2020) in JAX: pretraining, evaluation and sampling at any scale."""

__version__ = "0.1.0"
