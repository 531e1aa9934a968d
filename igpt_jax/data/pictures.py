"""Pictures as a Python caller has them, as pixels of a model's size: arrays, Pillow's images and files.

N images, H and W height and width, Y rows, X columns, C channels.
"""

import os
from collections.abc import Iterator, Sequence, Set

import numpy as np
from PIL import Image

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data.images import Unusable, decode, from_pillow, read

Picture = np.ndarray | Image.Image | str | os.PathLike
Pictures = Picture | Sequence[Picture]


def pixels(pictures: Pictures, image_size: int) -> np.ndarray:
    """Pictures of any size by the rules of data/images.py: the largest centered square, reduced by area averaging.

    Args:
      pictures: one or a sequence of: uint8 arrays [H, W, 3] (or one array [N, H, W, 3]), Pillow's images, paths of
        JPEG, PNG or WebP files (local, gs:// or s3://).
      image_size: of the model, pixels.

    Returns:
      uint8 [N, image_size, image_size, 3].

    Raises:
      UserError: there is no picture, or one that cannot be used; names it.
    """
    if isinstance(pictures, str | os.PathLike | Image.Image):
        pictures = [pictures]
    elif isinstance(pictures, Iterator | Set):
        pictures = list(pictures)
    elif not isinstance(pictures, list | tuple):
        pictures = np.asarray(pictures)  # of JAX and others too
        if pictures.ndim == 0:
            kind = type(pictures.item()).__name__
            raise UserError(f"images are of type {kind}. Give arrays uint8 [H, W, 3], paths or Pillow images.")
        pictures = pictures[None] if pictures.ndim == 3 else pictures
    if len(pictures) == 0:
        raise UserError("no images are given. Give at least one.")
    return np.stack([_one(picture, number, image_size) for number, picture in enumerate(pictures)])


def _one(picture: Picture, number: int, image_size: int) -> np.ndarray:
    try:
        if isinstance(picture, str | os.PathLike):
            return decode(read(storage.path(picture)), image_size)
        if isinstance(picture, Image.Image):
            return from_pillow(picture, image_size)
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise Unusable(f"an array of {array.dtype} {list(array.shape)}. Arrays must be uint8 [H, W, 3] or "
                           "[N, H, W, 3]; repeat a gray channel three times, scale floats by 255")
        return array if array.shape[:2] == (image_size,) * 2 else from_pillow(Image.fromarray(array), image_size)
    except Unusable as reason:
        name = f" ({os.fspath(picture)})" if isinstance(picture, str | os.PathLike) else ""
        raise UserError(f"image {number}{name}: {reason}.") from None
