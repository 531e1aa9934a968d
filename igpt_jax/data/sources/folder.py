"""A folder of pictures, local or in a bucket."""

import collections
import pathlib
from collections.abc import Iterator

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import images
from igpt_jax.data.sources.base import Item, Source, slice_of


class Folder(Source):
    """`folder:PATH`: each sub-folder a class, named and numbered in the order of names; or pictures without classes.

    Pictures are the files named .jpg, .jpeg, .png or .webp, at any depth, sorted by path. Files with other endings are
    counted and told, hidden ones (a name that begins with a dot, __MACOSX) are passed over. Links are followed.
    """

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        if not argument:
            raise UserError("source 'folder' needs a path: folder:PATH.")
        self._root = storage.path(argument)
        if not self._root.is_dir():
            raise UserError(f"folder:{argument} is not a folder. Check the path.")
        shown = [name for name in sorted(storage.listing(self._root)) if not _hidden(name)]
        names = [name for name in shown if name.lower().endswith(images.SUFFIXES)]
        others = (pathlib.PurePosixPath(name).suffix.lower() or "no ending" for name in shown
                  if not name.lower().endswith(images.SUFFIXES))
        self.skipped = dict(sorted(collections.Counter(others).items()))
        classed = [name for name in names if "/" in name]
        if classed and len(classed) < len(names):
            lone = next(name for name in names if "/" not in name)
            raise UserError(f"folder:{argument} holds pictures both in class folders ({classed[0]}) and beside them "
                            f"({lone}). Move these into a folder, or give folder:PATH/CLASS.")
        self.class_names = tuple(sorted({name.split("/")[0] for name in classed}))
        self._number = {name: i for i, name in enumerate(self.class_names)}
        self._names = [names[i] for i in slice_of(len(names), shard)]
        self.count, self.sizes = len(self._names), set()

    def items(self, start: int) -> Iterator[Item]:
        for name in self._names[start:]:
            yield Item(name, self._number.get(name.split("/")[0]), (self._root / name).read_bytes)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
