"""Images as tokens: in memory, or in .npy files such as OpenAI's imagenet_teX.npy (integers [n, T], an image per row).

Dimensions: B batch, T tokens of an image.
"""

import functools
import hashlib
import io
import os
import tokenize
import zipfile
from typing import Any

import numpy as np

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data.codecs import Codec

ROWS_AT_ONCE = 4096  # hashed at once


class Tokens:
    """Images as tokens in memory, integers [n, T], by id in [0, count)."""

    def __init__(self, rows_BT: np.ndarray):
        self._rows_BT, self.count = rows_BT, len(rows_BT)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, in place of a split's fingerprint."""
        digest = hashlib.sha256(f"{self._rows_BT.dtype} {self._rows_BT.shape}".encode())
        for start in range(0, len(self._rows_BT), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(self._rows_BT[start:start + ROWS_AT_ONCE]))
        return digest.hexdigest()

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Tokens int32 [B, T] of ids [B]."""
        return self._rows_BT[ids].astype(np.int32)


class TokenFile(Tokens):
    """Tokens in a file. A local file stays on disk, and rows are read as needed.

    Args:
      path: an .npy file; pickled data are never read.
      image_size: of the model, pixels.
      codec: of the model.

    Raises:
      UserError: not readable, or not integers [n, image_size^2 x channels].
    """

    def __init__(self, path: str, image_size: int, codec: Codec):
        self._path, self._codec = path, codec
        file = storage.path(path)
        try:
            local = storage.is_local(file) and file.exists()
            rows = (np.load(os.fspath(file), mmap_mode="r", allow_pickle=False) if local else
                    np.load(io.BytesIO(storage.read(file)), allow_pickle=False))
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, tokenize.TokenError) as error:
            if storage.unreachable(error):
                raise
            raise UserError(f"tokens {path}: not a plain .npy array ({next(iter(str(error).splitlines()), 'empty')}). "
                            "Save it with numpy.save.") from None
        tokens = image_size**2 * codec.channels
        if not (isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.dtype.kind in "iu"
                and rows.shape[1] == tokens and len(rows)):
            shape = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
            raise UserError(f"tokens {path} must be integers [n, {tokens}], one image of {image_size}x{image_size} "
                            f"pixels per row; this is {shape}. OpenAI's files are called "
                            "{imagenet,cifar10}_{tr,va,te}X.npy.")
        super().__init__(rows)

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Tokens int32 [B, T] of ids [B]. Raises UserError if a token is not in the model's vocabulary."""
        tokens_BT = self._rows_BT[ids]
        bad = np.flatnonzero(((tokens_BT < 0) | (tokens_BT >= self._codec.vocabulary)).any(axis=1))
        if bad.size:
            what = "colors of the checkpoint's palette" if self._codec.name == "palette" else "levels of a byte"
            raise UserError(f"tokens {self._path}: row {ids[bad[0]]} has a token outside "
                            f"0..{self._codec.vocabulary - 1}, the {what}. Use a checkpoint with the file's palette.")
        return tokens_BT.astype(np.int32)


def tokens_of(split: Any, codec: Codec | None, ids: np.ndarray) -> np.ndarray:
    """Tokens int32 [B, T] of ids [B] of a store's split, by its codec, or of Tokens."""
    return split.tokens(ids) if isinstance(split, Tokens) else codec.encode(split.read(ids)).astype(np.int32)
