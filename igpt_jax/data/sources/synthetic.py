"""Synthetic images, for tests of speed and scale."""

import re
from collections.abc import Iterator

import numpy as np

from igpt_jax.config import UserError
from igpt_jax.data.sources.base import Item, Source, slice_of

DRAWN_AT_ONCE = 1024
LARGEST = 256  # pixels; drawing DRAWN_AT_ONCE images of this size takes 4 GiB


class Synthetic(Source):
    """`synthetic:COUNT`: a color gradient with a disc, whose hue is one of ten classes. COUNT is 10,000 if not given.

    Images have the config's image_size, or 32 pixels. Dimensions: B images, Y rows, X columns, C channels.
    """
    CLASSES = 10

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        if not re.fullmatch("[0-9]{1,12}", argument or "10000") or int(argument or 1) < 1:
            raise UserError(f"source 'synthetic:{argument}': COUNT must be a positive integer below 10^12.")
        if image_size > LARGEST:
            raise UserError(f"image_size={image_size}: synthetic images have {LARGEST} pixels or less. Lower it.")
        self._size, self._seed = image_size or 32, seed
        self._mine = slice_of(int(argument or 10_000), shard)
        self.count, self.sizes = len(self._mine), {self._size}

    def items(self, start: int) -> Iterator[Item]:
        drawn = -1
        for i in self._mine[start:]:
            if i // DRAWN_AT_ONCE != drawn:
                drawn = i // DRAWN_AT_ONCE
                images_BYXC, labels_B = self._draw(drawn * DRAWN_AT_ONCE)
            yield Item(f"picture {i}", int(labels_B[i % DRAWN_AT_ONCE]), images_BYXC[i % DRAWN_AT_ONCE])

    def _draw(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """DRAWN_AT_ONCE images and their labels, from number `first` on; they depend only on the seed and `first`."""
        count = DRAWN_AT_ONCE
        rng = np.random.default_rng([self._seed, first])
        labels_B = rng.integers(self.CLASSES, size=count, dtype=np.int32)
        grid = np.linspace(-1, 1, self._size)

        def each(low: float, high: float) -> np.ndarray:
            """A random number for each image, [B, 1, 1]."""
            return rng.uniform(low, high, (count, 1, 1))

        angle_B11, base_B1C = each(0, 2 * np.pi), rng.uniform(40, 215, (count, 1, 1, 3))
        slope_BYX = grid[None, :, None] * np.sin(angle_B11) + grid[None, None, :] * np.cos(angle_B11)
        images_BYXC = base_B1C + 40 * slope_BYX[..., None]
        distance_BYX = np.hypot(grid[None, :, None] - each(-0.5, 0.5), grid[None, None, :] - each(-0.5, 0.5))
        disc_BYX1 = np.clip((each(0.3, 0.7) - distance_BYX) * self._size / 2, 0, 1)[..., None]
        hue_BC = labels_B[:, None] / self.CLASSES + np.array([0, 1 / 3, 2 / 3])
        color_B11C = (127.5 + 120 * np.cos(2 * np.pi * hue_BC))[:, None, None, :]
        images_BYXC += disc_BYX1 * (color_B11C - images_BYXC)
        return np.rint(np.clip(images_BYXC, 0, 255)).astype(np.uint8), labels_B
