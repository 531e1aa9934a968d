"""Random crops and mirrors, as functions of (seed, position in the run's sequence of examples). NumPy only.

Any run, any number of hosts and either reader draws the same ones.

- Recipe `cifar` moves pixels and changes none, so it may be done before quantization or after.
- Recipe `imagenet` (paper, Section 3.1) scales the shorter side to a random size in [256, 384], takes a random 224x224
  crop and reduces it. Scaling, crop and reduction are one here: the crop is a square window of the picture's own
  pixels (corner and size rounded to whole ones), which `images.decode` reduces in one area resampling.

Dimensions: B examples; Y rows, X columns.
"""

import numpy as np

from igpt_jax.data import order

AUGMENTATIONS = ("none", "cifar", "imagenet")
PAD = 4  # pixels
CROP, SHORTEST, LONGEST = 224, 256, 384  # pixels


def crop_and_mirror(seed: int, position_B: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Recipe `cifar`: reflect-pad by 4, crop at random to the former size, mirror every other (paper, Section 3.1).

    Returns:
      For each pixel of the result where it comes from: rows int32 [B, Y] and columns int32 [B, X].
    """
    top, left, mirror = order.draws(seed, position_B, 3).T
    offsets = 2 * PAD + 1
    steps = np.arange(image_size)
    columns_BX = np.where((mirror >> np.uint64(63)).astype(bool)[:, None], steps[::-1], steps)
    rows_BY = steps + (top % offsets).astype(np.int64)[:, None] - PAD
    columns_BX = columns_BX + (left % offsets).astype(np.int64)[:, None] - PAD
    return _reflected(rows_BY, image_size), _reflected(columns_BX, image_size)


def _reflected(place: np.ndarray, size: int) -> np.ndarray:
    """Places outside [0, size) mirrored at its ends, which are not repeated."""
    place = np.abs(place)
    return np.where(place >= size, 2 * (size - 1) - place, place).astype(np.int32)


def moved(tokens_BT: np.ndarray, rows_BY: np.ndarray, columns_BX: np.ndarray) -> np.ndarray:
    """Images' tokens [B, T] with each pixel from where `crop_and_mirror` says."""
    count, size = columns_BX.shape
    first_B = np.arange(count, dtype=np.int32)[:, None, None] * np.int32(size**2)
    place_BYX = first_B + rows_BY[:, :, None] * np.int32(size) + columns_BX[:, None, :]
    return tokens_BT.reshape(-1).take(place_BYX).reshape(tokens_BT.shape)


def unit_draws(seed: int, position_B: np.ndarray, count: int) -> np.ndarray:
    """Uniform in [0, 1), float64 [B, count], for augment `imagenet`: `window` says what they choose."""
    return (order.draws(seed, position_B, count) >> np.uint64(11)) / 2**53


def window(draws_3: np.ndarray, image_size: int, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of augment `imagenet`'s square in a picture of at least image_size pixels a side.

    Args:
      draws_3: of scale, top and left, float64 in [0, 1).
      image_size: the least side, since nothing is enlarged.
    """
    scale, top, left = draws_3
    shorter = min(width, height)
    scaled = SHORTEST + np.floor(scale * (LONGEST - SHORTEST + 1))
    side = min(max(round(CROP * shorter / scaled), image_size), shorter)
    return int(left * (width - side + 1)), int(top * (height - side + 1)), side
