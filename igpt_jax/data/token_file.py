"""Files of tokens, as OpenAI published them: imagenet_teX.npy and the like, whole numbers [n, T], one image a row.

B batch, T tokens of an image.
"""

import functools
import hashlib
import io
import os

import numpy as np

from igpt_jax import storage
from igpt_jax.config import UserError

ROWS_HASHED = 4096  # at a time


class TokenFile:
    """Images as palette indices, by id in [0, count). A local file stays on disk and is read row by row.

    Args:
      path: an .npy file; nothing pickled is read.
      image_size: of the model, pixels.
      colors: of the model's palette.

    Raises:
      UserError: not readable, or not whole numbers [n, image_size^2].
    """

    def __init__(self, path: str, image_size: int, colors: int):
        self._path, self._colours = path, colors
        file = storage.path(path)
        try:
            local = storage.is_local(file) and file.exists()
            self._rows_BT = (np.load(os.fspath(file), mmap_mode="r", allow_pickle=False) if local else
                             np.load(io.BytesIO(storage.read(file)), allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"tokens {path}: not a plain .npy array ({str(error).splitlines()[0]}).") from None
        tokens, rows = image_size**2, self._rows_BT
        if not (isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.dtype.kind in "iu"
                and rows.shape[1] == tokens and len(rows)):
            shape = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
            raise UserError(f"tokens {path} must be whole numbers [n, {tokens}], {image_size}x{image_size} pixels "
                            f"a row; this is {shape}. OpenAI's are called {{imagenet,cifar10}}_{{tr,va,te}}X.npy.")
        self.count = len(rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, as of a split of a store."""
        digest = hashlib.sha256(f"{self._rows_BT.dtype} {self._rows_BT.shape}".encode())
        for start in range(0, len(self._rows_BT), ROWS_HASHED):
            digest.update(np.ascontiguousarray(self._rows_BT[start:start + ROWS_HASHED]))
        return digest.hexdigest()

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [B, T]. Raises UserError, naming a row, where a token is no color of the palette."""
        tokens_BT = self._rows_BT[ids]
        bad = np.flatnonzero(((tokens_BT < 0) | (tokens_BT >= self._colours)).any(axis=1))
        if bad.size:
            raise UserError(f"tokens {self._path}: row {ids[bad[0]]} has a token outside 0..{self._colours - 1}, the "
                            "colors of the checkpoint's palette. They must be of one palette.")
        return tokens_BT.astype(np.int32)
