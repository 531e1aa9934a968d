"""Batches for training, from pixel stores or TFDS, in an order that is a function of (seed, step).

Dimensions: B batch, T tokens.
"""

from igpt_jax.data.batches import Batch, Batches, count_classes, open_data, open_split, train_batches

__all__ = [
    "Batch", "Batches", "count_classes", "open_data", "open_split", "train_batches",
]
