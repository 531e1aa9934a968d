"""Codecs: the pixels of images as tokens, and back. NumPy only.

    codec     tokens of a pixel               vocabulary            lost
    palette   the index of its nearest color  length of the palette the color's distance to the palette's
    rgb       its bytes R, G and B            256                   nothing
    grey      its luma, one byte              256                   hue and saturation

Pixels are read row by row (paper, Section 2.1), and the channels of a pixel one after the other. Stores keep pixels, so
any codec reads any store.

B images, T tokens, V vocabulary; Y rows, X columns, C channels: tokens per pixel in `B Y X C` of tokens, else 3.
"""

import functools
import math
import threading
from typing import Any, ClassVar

import numpy as np

from igpt_jax.config import CODECS, LEVELS
from igpt_jax.data import palette


class Codec:
    """What all codecs have in common.

    Attributes:
      name: a value of the key `codec`.
      vocabulary: V, number of different tokens.
      palette_VC: float32 [V, 3] in [-1, 1]; [0, 3] in codecs without a palette.
    """
    name: ClassVar[str]
    vocabulary: int = LEVELS
    dtype: ClassVar[type] = np.uint8  # of tokens in memory
    palette_VC = np.zeros((0, 3), np.float32)

    def __str__(self) -> str:
        return f"{self.vocabulary} {'colors' if self.name == 'palette' else f'levels of {self.name}'}"

    @property
    def channels(self) -> int:
        """C, tokens per pixel."""
        return CODECS[self.name]

    @property
    def has_bits(self) -> bool:
        """Whether losses in bits per dimension compare with other models of the same pixels: not those of a palette,
        which loses most of a color."""
        return self.name != "palette"

    @property
    def black(self) -> int:
        """The token, or each of the tokens, of a black pixel."""
        return int(self.encode(np.zeros((1, 1, 1, 3), np.uint8))[0, 0])

    def encode(self, images_BYXC: np.ndarray) -> np.ndarray:
        """Tokens [B, T], of `dtype`, of images uint8 [B, Y, X, 3]."""
        raise NotImplementedError

    def colors(self, tokens_BYXC: np.ndarray) -> np.ndarray:
        """Pixels uint8 [..., 3] of their tokens [..., C]."""
        raise NotImplementedError

    def decode(self, tokens_BT: np.ndarray) -> np.ndarray:
        """The square images, uint8 [B, Y, X, 3], of their tokens."""
        size = math.isqrt(tokens_BT.shape[1] // self.channels)
        return self.colors(tokens_BT.reshape(-1, size, size, self.channels))

    def bits_per_dimension(self, nats_per_pixel: Any) -> Any:
        """Nats per pixel as bits per sub-pixel (`rgb`) or grey level."""
        return nats_per_pixel / (self.channels * math.log(2))


class Palette(Codec):
    """An index of the palette per pixel: `palette.encode`, `palette.decode`."""
    name, dtype = "palette", np.uint16

    def __init__(self, palette_VC: np.ndarray):
        self.palette_VC, self.vocabulary = palette_VC, len(palette_VC)
        self._building, self._table = threading.Lock(), None

    @property
    def table(self) -> np.ndarray:
        """`palette.lookup_table`; not built where tokens are only decoded."""
        with self._building:  # the threads of tf.data and of the demo ask for it at the same time
            if self._table is None:
                self._table = palette.lookup_table(self.palette_VC)
        return self._table

    def encode(self, images_BYXC: np.ndarray) -> np.ndarray:
        return palette.encode(images_BYXC, self.table)

    def colors(self, tokens_BYXC: np.ndarray) -> np.ndarray:
        return palette.decode(tokens_BYXC[..., 0], self.palette_VC)


class Rgb(Codec):
    """The bytes R, G and B of each pixel, as density models of sub-pixels read them (PixelCNN and its successors)."""
    name = "rgb"

    def encode(self, images_BYXC: np.ndarray) -> np.ndarray:
        return images_BYXC.reshape(len(images_BYXC), -1)

    def colors(self, tokens_BYXC: np.ndarray) -> np.ndarray:
        return tokens_BYXC.astype(np.uint8)


class Grey(Codec):
    """The luma of each pixel: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), in 2^-16, rounded. A grey pixel is exact."""
    name = "grey"
    WEIGHTS = np.array([19595, 38470, 7471], np.uint32)  # their sum is 2^16

    def encode(self, images_BYXC: np.ndarray) -> np.ndarray:
        luma_BYX = (images_BYXC @ self.WEIGHTS + 2**15) >> 16
        return luma_BYX.astype(np.uint8).reshape(len(images_BYXC), -1)

    def colors(self, tokens_BYXC: np.ndarray) -> np.ndarray:
        return tokens_BYXC.astype(np.uint8).repeat(3, axis=-1)


def codec_of(name: str, palette_VC: np.ndarray) -> Codec:
    """The codec of a checkpoint or a run; `palette_VC` is used by `palette` alone. Equal ones are one object."""
    return _codec(name, np.asarray(palette_VC, np.float32).tobytes() if name == "palette" else b"")


@functools.lru_cache(maxsize=8)
def _codec(name: str, colors: bytes) -> Codec:
    if name == "palette":
        return Palette(np.frombuffer(colors, np.float32).reshape(-1, 3))
    return {"rgb": Rgb, "grey": Grey}[name]()
