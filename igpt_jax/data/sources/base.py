"""The interface of a source of images, and helpers that several sources use."""

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
      label: its class number; None: unlabeled.
      content: an encoded picture, a function that reads one, or a square uint8 array [Y, X] or [Y, X, 3].
    """
    name: str
    label: int | None
    content: bytes | Callable[[], bytes] | np.ndarray


class Source(Protocol):
    """The images of one slice of a source, in a fixed order.

    Attributes:
      count: number of images.
      sizes: the images' heights and widths, pixels, if all are square and known; else empty.
      class_names: names of the classes by label; empty: they have none.
      skipped: files that were skipped because they are not images: kind -> count.
      notices: lines to log for the user.
      contents: summary of the whole source, not only of the slice (contents.summarize); empty: it cannot change.
    """
    count: int
    sizes: set[int]
    class_names: tuple[str, ...] = ()
    skipped: Mapping[str, int] = {}
    notices: tuple[str, ...] = ()
    contents: Mapping[str, Any] = {}

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]): ...

    def items(self, start: int) -> Iterator[Item]:
        """Yields the slice's images from number `start` on. Damaged pictures raise only when they are decoded."""


def files_of(name: str, argument: str) -> list[epath.Path]:
    """The files that match the path or glob `argument` of source `name`.

    Raises:
      UserError: no path, no match, or a match that is not a regular file. Opening a pipe could block forever.
    """
    if not argument:
        raise UserError(f"source {name!r} needs a path: {name}:PATH, or a glob that matches several files.")
    files = storage.matching(argument)
    for file in files:
        if storage.is_local(file) and not os.path.isfile(file):
            raise UserError(f"{file} is not a regular file. Leave it out of the pattern.")
    return files


def slice_of(count: int, shard: tuple[int, int]) -> range:
    """The indices in [0, count) of slice i of n, where `shard` is (i, n). Slices differ by at most one in size."""
    i, n = shard
    return range(i * count // n, (i + 1) * count // n)
