"""What a source is."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError


class Item(NamedTuple):
    """One image of a source, before it is decoded.

    Attributes:
      name: for the quarantine list.
      label: its class; None where unlabelled.
      content: an encoded picture, a function that reads one, or a square uint8 array [Y, X] or [Y, X, 3].
    """
    name: str
    label: int | None
    content: bytes | Callable[[], bytes] | np.ndarray


class Source(Protocol):
    """Images in a fixed order; those of one slice.

    Attributes:
      count: how many.
      sizes: their own heights and widths, pixels, where all are square and known; else empty.
      class_names: of the labels, where they have names.
      skipped: what was passed over for its kind and is no image: kind -> how many.
      notices: lines to tell the user.
      contents: the summary of the whole source, not of the slice alone (contents.summarize); empty: it cannot change.
    """
    count: int
    sizes: set[int]
    class_names: tuple[str, ...] = ()
    skipped: Mapping[str, int] = {}
    notices: tuple[str, ...] = ()
    contents: Mapping[str, Any] = {}

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]): ...

    def items(self, start: int) -> Iterator[Item]:
        """Yields the images from `start` on. Raises images.Unusable never: that is for decoding."""


def files_of(name: str, argument: str) -> list[epath.Path]:
    """The files that the path or glob given to source `name` stands for.

    Raises:
      UserError: no path, no file, or something that is no regular file: opening a pipe could wait without end.
    """
    if not argument:
        raise UserError(f"source {name!r} needs a path: {name}:PATH, or a glob of several files.")
    files = storage.matching(argument)
    for file in files:
        if storage.is_local(file) and not os.path.isfile(file):
            raise UserError(f"{file} is not a regular file. Leave it out of the pattern.")
    return files


def slice_of(count: int, shard: tuple[int, int]) -> range:
    """The indices of [0, count) that belong to slice i of n: contiguous, sizes differ by one at most."""
    i, n = shard
    return range(i * count // n, (i + 1) * count // n)
