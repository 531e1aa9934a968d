"""Random shifts, crops and mirrors. NumPy only.

They are functions of (seed, position in the run's sequence of examples), so they do not depend on the number of hosts,
on the reader, or on where a run resumes.

- `shift` and `cifar` move pixels without changing any, so they can be applied before or after quantization.
- `imagenet` (paper, Section 3.1) scales the shorter side to a random size in [256, 384], takes a random 224x224 crop
  and reduces it. All three are one step here: the crop is a square window of the picture's own pixels (corner and side
  rounded to integers), which `images.decode` reduces in one area resampling.

Dimensions: B examples, T tokens; Y rows, X columns, C tokens per pixel.
"""

import math

import numpy as np

from igpt_jax.data import order
from igpt_jax.data.codecs import Codec

PAD = 4  # pixels
CROP, SHORTEST, LONGEST = 224, 256, 384  # pixels


def augmented(augment: str, tokens_BT: np.ndarray, seed: int, position_B: np.ndarray, codec: Codec) -> np.ndarray:
    """Tokens [B, T] of images after augment `shift` or `cifar`; unchanged after any other.

    Args:
      augment: value of the key data.augment.
      position_B: of each image in the run's sequence of examples.
      codec: of the tokens.
    """
    size = math.isqrt(tokens_BT.shape[1] // codec.channels)
    tokens_BYXC = tokens_BT.reshape(-1, size, size, codec.channels)
    if augment == "shift":
        tokens_BYXC = shifted(tokens_BYXC, seed, position_B, codec.black)
    if augment == "cifar":
        tokens_BYXC = moved(tokens_BYXC, *crop_and_mirror(seed, position_B, size))
    return tokens_BYXC.reshape(tokens_BT.shape)


def shifted(tokens_BYXC: np.ndarray, seed: int, position_B: np.ndarray, black: int) -> np.ndarray:
    """Augment `shift`: pad with black by 1, crop at random to the original size."""
    top_B, left_B = (order.draws(seed, position_B, 2) % 3).astype(np.int64).T
    padded_BYXC = np.pad(tokens_BYXC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=black)
    steps = np.arange(tokens_BYXC.shape[1])
    return padded_BYXC[np.arange(len(padded_BYXC))[:, None, None], (top_B[:, None] + steps)[:, :, None],
                       (left_B[:, None] + steps)[:, None, :]]


def crop_and_mirror(seed: int, position_B: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Augment `cifar`: reflect-pad by 4, crop at random to the original size, mirror half of them (paper, Section 3.1).

    Returns:
      The source of each pixel of the result: rows int32 [B, Y] and columns int32 [B, X].
    """
    top, left, mirror = order.draws(seed, position_B, 3).T
    offsets = 2 * PAD + 1
    steps = np.arange(image_size)
    # The top bit mirrors; a remainder chooses each offset. 2^64 is so large that the remainder's bias does not matter.
    columns_BX = np.where((mirror >> np.uint64(63)).astype(bool)[:, None], steps[::-1], steps)
    rows_BY = steps + (top % offsets).astype(np.int64)[:, None] - PAD
    columns_BX = columns_BX + (left % offsets).astype(np.int64)[:, None] - PAD
    return _reflected(rows_BY, image_size), _reflected(columns_BX, image_size)


def _reflected(index: np.ndarray, size: int) -> np.ndarray:
    """Indices outside [0, size) reflected at its ends without repeating these, as NumPy's pad mode "reflect" does."""
    index = np.abs(index)
    return np.where(index >= size, 2 * (size - 1) - index, index).astype(np.int32)


def moved(tokens_BYXC: np.ndarray, rows_BY: np.ndarray, columns_BX: np.ndarray) -> np.ndarray:
    """Tokens [B, Y, X, C] of images whose pixels come from the rows and columns that `crop_and_mirror` returns."""
    count, size = columns_BX.shape
    first_B11 = np.arange(count, dtype=np.int32)[:, None, None] * np.int32(size**2)
    index_BYX = first_B11 + rows_BY[:, :, None] * np.int32(size) + columns_BX[:, None, :]
    return tokens_BYXC.reshape(-1, tokens_BYXC.shape[-1]).take(index_BYX, axis=0)


def unit_draws(seed: int, position_B: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1) for augment `imagenet`, float64 [B, count]; `window` explains their use."""
    return (order.draws(seed, position_B, count) >> np.uint64(11)) / 2**53


def window(draws_3: np.ndarray, image_size: int, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the square that augment `imagenet` crops from a picture of width x height, pixels.

    Args:
      draws_3: random numbers in [0, 1) for scale, top and left, float64 [3].
      image_size: the smallest side, pixels, because images are never enlarged.
    """
    scale, top, left = draws_3
    shorter = min(width, height)
    scaled = SHORTEST + np.floor(scale * (LONGEST - SHORTEST + 1))
    side = min(max(round(CROP * shorter / scaled), image_size), shorter)
    return int(left * (width - side + 1)), int(top * (height - side + 1)), side
