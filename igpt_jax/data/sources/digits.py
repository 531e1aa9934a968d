"""Scikit-learn's handwritten digits, which come with its package."""

from collections.abc import Iterator

import numpy as np

from igpt_jax.config import UserError
from igpt_jax.data.sources.base import Item, Source, slice_of

TRAIN = 1437  # images


class Digits(Source):
    """1,797 handwritten digits: 8x8, 17 gray levels 0..16, ten classes.

    `digits:train` is the first four fifths, `digits:test` the rest.
    """
    class_names = tuple("0123456789")

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        from sklearn.datasets import load_digits  # takes a second to import

        splits = {"": slice(None), "train": slice(TRAIN), "test": slice(TRAIN, None)}
        if argument not in splits:
            raise UserError(f"source 'digits:{argument}' is not known. Write digits, digits:train or digits:test.")
        data, split = load_digits(), splits[argument]
        self._gray_BYX = np.rint(data.images[split] * (255 / 16)).astype(np.uint8)
        self._labels_B = data.target[split]
        self._mine = slice_of(len(self._gray_BYX), shard)
        self.count, self.sizes = len(self._mine), {8}

    def items(self, start: int) -> Iterator[Item]:
        for i in self._mine[start:]:
            yield Item(f"digit {i}", int(self._labels_B[i]), self._gray_BYX[i])
