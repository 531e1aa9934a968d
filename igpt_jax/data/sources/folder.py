"""A folder of pictures, local or in a bucket."""

import collections
import functools
import pathlib
import re
from collections.abc import Iterator

from igpt_jax import storage
from igpt_jax.config import JOBS, UserError
from igpt_jax.data import images
from igpt_jax.data.sources import contents
from igpt_jax.data.sources.base import Item, Source, slice_of

SPLIT_NAME = re.compile(r"(train|training|val|valid|validation|dev|test|testing|held_?out)[-_ ]?\d*", re.IGNORECASE)
SHOWN = 3  # names in a log line


class Folder(Source):
    """`folder:PATH`: each subfolder is a class, numbered in the order of names; or pictures without classes.

    - Pictures are the files named .jpg, .jpeg, .png or .webp, at any depth, sorted by path.
    - Files with other endings are counted and reported.
    - Hidden files (a name that begins with a dot, __MACOSX) and the workdirs of jobs are skipped.
    - Links are followed, but each folder is read once.
    - Names are compared and sorted in Unicode's form NFC.
    """

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        if not argument:
            raise UserError("source 'folder' needs a path: folder:PATH.")
        self._root = storage.path(argument)
        if not self._root.is_dir():
            raise UserError(f"folder:{argument} is not a folder. Check the path.")
        linked: dict[str, str] = {}
        sizes = storage.listing(self._root, linked)
        workdirs = self._workdirs(sizes)
        if "" in workdirs:
            raise UserError(f"folder:{argument} is the workdir of a job. Give a folder that has only pictures, and "
                            "another --workdir.")
        visible = [name for name in sorted(sorted(sizes), key=contents.nfc)
                   if not _inside(name, workdirs) and "__MACOSX" not in name.split("/")]
        names = [name for name in visible if _is_picture(name)]
        others = [name for name in visible if not _is_picture(name)]
        suffixes = (pathlib.PurePosixPath(name).suffix.lower() or "no ending" for name in others)
        self.skipped = dict(sorted(collections.Counter(suffixes).items()))
        classed = [name for name in names if "/" in name]
        if classed and len(classed) < len(names):
            lone = next(name for name in names if "/" not in name)
            raise UserError(f"folder:{argument} has pictures both in class folders ({classed[0]}) and outside them "
                            f"({lone}). Move the latter into a class folder, or give folder:PATH/CLASS.")
        folders = {name.split("/")[0] for name in classed}
        self.class_names = tuple(sorted(set(map(contents.nfc, folders))))
        self.notices = _notices(argument, folders, linked, workdirs)
        self._number = {name: i for i, name in enumerate(self.class_names)}
        self._names = [names[i] for i in slice_of(len(names), shard)]
        self.count, self.sizes = len(self._names), set()
        self.contents = contents.summarize((f"{name}, {sizes[name]:,} bytes" for name in names), self.class_names)

    def items(self, start: int) -> Iterator[Item]:
        for name in self._names[start:]:
            label = self._number.get(contents.nfc(name.split("/")[0]))
            yield Item(name, label, functools.partial(images.read, self._root / name))

    def _workdirs(self, names: dict[str, int]) -> list[str]:
        """The folders that are workdirs of jobs, by their config.json; "" is the source itself."""
        found = []
        for name, size in names.items():
            if name.rpartition("/")[2] != "config.json" or not 0 < size < 2**20:  # a pipe has size 0
                continue
            try:
                job = storage.parse_json(storage.read(self._root / name))["job"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(job, str) and job in JOBS:
                found.append(name.rpartition("/")[0])
        return sorted(folder for folder in found if not _inside(folder, found))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(images.SUFFIXES)


def _inside(name: str, folders: list[str]) -> bool:
    return any(name.startswith(f"{folder}/") for folder in folders)


def _notices(argument: str, folders: set[str], linked: dict[str, str], workdirs: list[str]) -> tuple[str, ...]:
    """Log lines on folders that were skipped or merged, and on classes that look like splits."""
    lines = []
    if linked:
        lines.append(f"folder:{argument}: skipping " + _some([f"{name} (the same folder as {first})"
                                                              for name, first in sorted(linked.items())]))
    if workdirs:
        lines.append(f"folder:{argument}: skipping the workdirs of jobs: {_some(workdirs)}")
    forms = collections.Counter(map(contents.nfc, folders))
    if twice := sorted(name for name, count in forms.items() if count > 1):
        lines.append(f"folder:{argument}: folders whose names differ only in Unicode form are one class: "
                     f"{_some(twice)}")
    if forms and all(map(SPLIT_NAME.fullmatch, forms)):
        first, *rest = sorted(forms, key=lambda name: not name.lower().startswith("train"))
        test = f" and --config.test_source=folder:{argument}/{rest[0]}" if rest else ""
        lines.append(f"folder:{argument}: its classes are named like splits. To read them as splits, set "
                     f"--config.source=folder:{argument}/{first}{test}")
    return tuple(lines)


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return contents.on_one_line(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
