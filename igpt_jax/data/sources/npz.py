"""NumPy archives of images and labels. Pickled data are never read."""

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data.sources import contents
from igpt_jax.data.sources.base import Item, Source, files_of, slice_of


class Npz(Source):
    """`npz:PATH`, or a glob that matches several files, which are sorted by name.

    Each file has `images` uint8 [n, Y, X, 3], or [n, Y, X] for gray, and optionally `labels`, integers [n].
    """

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        self._files = files_of("npz", argument)
        headers = [_check(file) for file in self._files]
        self.contents = contents.of_files(self._files, [_checksums(file) for file in self._files])
        self._counts = [shape[0] for shape, _ in headers]
        self._mine = slice_of(sum(self._counts), shard)
        self.count, self.sizes = len(self._mine), {shape[1] for shape, _ in headers}
        if not image_size and len(self.sizes) > 1:
            raise UserError(f"{argument!r} has images of {sorted(self.sizes)} pixels. "
                            "Set image_size to reduce them to one size.")
        for file, (_, labeled) in zip(self._files, headers, strict=True):
            if labeled != headers[0][1]:
                raise UserError(f"{file} and {self._files[0]}: one has labels, the other none. Give labels to "
                                "both or neither.")

    def items(self, start: int) -> Iterator[Item]:
        mine, first = self._mine[start:], 0
        for file, count in zip(self._files, self._counts, strict=True):
            wanted = range(max(mine.start, first), min(mine.stop, first + count))
            if wanted:
                for i, (label, image) in enumerate(_rows(file, wanted.stop - first)):
                    if i >= wanted.start - first:
                        yield Item(f"{file.name}[{i}]", label, image)
            first += count


def _rows(file: epath.Path, stop: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yields the first `stop` images with their labels. They are read one by one: an archive may exceed memory."""
    labels = None
    with _archive_errors(file), file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
        if "labels.npy" in archive.namelist():
            with archive.open("labels.npy") as member:
                labels = np.lib.format.read_array(member, allow_pickle=False)
            if not (0 <= labels.min() and labels.max() < 2**31):
                raise UserError(f"{file}: labels must be integers from 0 to 2^31 - 1.")
    with contextlib.ExitStack() as stack:
        with _archive_errors(file):
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(file.open("rb"))))
            member = stack.enter_context(archive.open("images.npy"))
            (_, *shape), _ = _read_header(member)
        size = int(np.prod(shape))
        for i in range(stop):
            with _archive_errors(file):
                data = member.read(size)
                if len(data) != size:
                    raise EOFError(f"images ends after {i:,}")
                if i == stop - 1:
                    member.read(1)  # at the end of a member zipfile compares its CRC
            yield None if labels is None else int(labels[i]), np.frombuffer(data, np.uint8).reshape(shape)


def _checksums(file: epath.Path) -> str:
    """The arrays' CRCs, from the archive's directory, without reading the arrays."""
    with _archive_errors(file), file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
        return ", ".join(f"{info.filename} {info.CRC:08x}" for info in archive.infolist())


def _check(file: epath.Path) -> tuple[tuple[int, ...], bool]:
    """The shape of the images and whether there are labels, from the headers alone. Raises UserError."""
    with _archive_errors(file), file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
        members = set(archive.namelist())
        if "images.npy" not in members:
            keys = ", ".join(sorted(name.removesuffix(".npy") for name in members)) or "nothing"
            raise UserError(f"{file} needs an array `images`; it has {keys}. Save with numpy.savez(FILE, images=...).")
        shape, dtype = _header(archive, "images")
        labels = _header(archive, "labels") if "labels.npy" in members else None
    rgb_or_gray = len(shape) == 3 or len(shape) == 4 and shape[3] == 3
    if dtype != np.uint8 or not rgb_or_gray:
        raise UserError(f"{file}: images is {dtype} {list(shape)}; save it as uint8 [n, Y, X, 3] or [n, Y, X].")
    if 0 in shape:
        raise UserError(f"{file}: images is empty, {list(shape)}. Leave the file out.")
    if shape[1] != shape[2]:
        raise UserError(f"{file}: images are {shape[1]}x{shape[2]} pixels. Crop them to squares first.")
    if labels and (labels[0] != shape[:1] or labels[1].kind not in "iu"):
        raise UserError(f"{file}: labels is {labels[1]} {list(labels[0])}; save it as integers [{shape[0]}].")
    return shape, labels is not None


@contextlib.contextmanager
def _archive_errors(file: epath.Path) -> Iterator[None]:
    """Turns the errors of damaged archives into a UserError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, TypeError, ValueError, RuntimeError,
            EOFError, OSError, ImportError, MemoryError) as error:
        if storage.unreachable(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not a readable .npz archive ({reason}). Save it with numpy.savez.") from None


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array `name`. Raises ValueError if the archive cannot hold that many values."""
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _read_header(member)
        size = 0 if dtype.hasobject else member.tell() + math.prod(shape) * dtype.itemsize
        if size > archive.getinfo(f"{name}.npy").file_size:  # a made-up shape must not decide how much is allocated
            raise ValueError(f"{name} ends early")
        return shape, dtype


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy file; leaves `member` at the first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(member)
    if by_columns and len(shape) > 1:
        raise ValueError("the array is in Fortran order; save numpy.ascontiguousarray of it")
    return shape, dtype
