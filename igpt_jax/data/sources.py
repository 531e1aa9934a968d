"""Where images come from: each source yields uint8 RGB images, and labels where it has them, in chunks.

A source is one class and one row of SOURCES.

Dimensions: B images of a chunk; Y rows, X columns, C channels.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from igpt_jax import storage
from igpt_jax.config import UserError, nearest

CHUNK = 1024  # images
RESIZE_RULE = "area: Pillow's BOX filter on the square image"

Chunk = tuple[np.ndarray, np.ndarray | None]


class Source(Protocol):
    """Images in a fixed order.

    Attributes:
      count: how many.
      sizes: their own heights and widths, pixels; several only where the config brings them to one.
    """
    count: int
    sizes: set[int]

    def chunks(self) -> Iterator[Chunk]:
        """Yields images uint8 [B, Y, X, 3] and labels int32 [B], or None where there are none."""


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8x8, 17 grey levels 0..16, ten classes. Part of the package."""

    def __init__(self, argument: str, image_size: int, seed: int):
        from sklearn.datasets import load_digits  # imports for a second

        if argument:
            raise UserError(f"source 'digits:{argument}' takes no argument. Write digits.")
        data = load_digits()
        grey_BYX = np.rint(data.images * (255 / 16)).astype(np.uint8)
        self._images_BYXC, self._labels_B = _rgb(grey_BYX), data.target.astype(np.int32)
        self.count, self.sizes = len(grey_BYX), {8}

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.count, CHUNK):
            yield self._images_BYXC[start:start + CHUNK], self._labels_B[start:start + CHUNK]


class Synthetic:
    """Made-up pictures, for tests of speed and scale: a colour gradient and a disc, whose hue is the class of ten.

    `synthetic:COUNT`; 10,000 without a count. Of the config's image_size, or 32.
    """
    CLASSES = 10

    def __init__(self, argument: str, image_size: int, seed: int):
        if not (argument or "10000").isdigit() or int(argument or 1) < 1:
            raise UserError(f"source 'synthetic:{argument}': COUNT must be a positive whole number.")
        self.count, self._size, self._seed = int(argument or 10_000), image_size or 32, seed
        self.sizes = {self._size}

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.count, CHUNK):
            yield self._draw(start, min(CHUNK, self.count - start))

    def _draw(self, start: int, count: int) -> Chunk:
        rng = np.random.default_rng([self._seed, start])
        labels_B = rng.integers(self.CLASSES, size=count, dtype=np.int32)
        grid = np.linspace(-1, 1, self._size)

        def each(low: float, high: float) -> np.ndarray:
            """A number for each image, [B, 1, 1]."""
            return rng.uniform(low, high, (count, 1, 1))

        angle_B11, base_B1C = each(0, 2 * np.pi), rng.uniform(40, 215, (count, 1, 1, 3))
        slope_BYX = grid[None, :, None] * np.sin(angle_B11) + grid[None, None, :] * np.cos(angle_B11)
        images_BYXC = base_B1C + 40 * slope_BYX[..., None]
        distance_BYX = np.hypot(grid[None, :, None] - each(-0.5, 0.5), grid[None, None, :] - each(-0.5, 0.5))
        disc_BYX1 = np.clip((each(0.3, 0.7) - distance_BYX) * self._size / 2, 0, 1)[..., None]
        hue_BC = labels_B[:, None] / self.CLASSES + np.array([0, 1 / 3, 2 / 3])
        colour_B11C = (127.5 + 120 * np.cos(2 * np.pi * hue_BC))[:, None, None, :]
        images_BYXC += disc_BYX1 * (colour_B11C - images_BYXC)
        return np.rint(np.clip(images_BYXC, 0, 255)).astype(np.uint8), labels_B


class Npz:
    """NumPy archives: `npz:PATH` or a glob of several, sorted by name.

    Each holds `images` uint8 [n, Y, X, 3], or [n, Y, X] for grey, and optionally `labels`, whole numbers [n]. One file
    is in memory at a time. Nothing pickled is read.
    """

    def __init__(self, argument: str, image_size: int, seed: int):
        if not argument:
            raise UserError("source 'npz' needs a path: npz:PATH, or a glob of several files.")
        self._files = storage.matching(argument)
        headers = [self._check(file) for file in self._files]
        self.count = sum(shape[0] for shape, _ in headers)
        self.sizes = {shape[1] for shape, _ in headers}
        if not image_size and len(self.sizes) > 1:
            raise UserError(f"{argument!r} holds images of {sorted(self.sizes)} pixels. "
                            "Set image_size to bring them to one size.")
        for file, (_, labelled) in zip(self._files, headers, strict=True):
            if labelled != headers[0][1]:
                raise UserError(f"{file} and {self._files[0]}: one has labels, the other none. Both or neither must.")

    def chunks(self) -> Iterator[Chunk]:
        for file in self._files:
            with _archive_errors(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                images, labels = archive["images"], archive["labels"] if "labels" in archive else None
            if labels is not None and not (0 <= labels.min() and labels.max() < 2**31):
                raise UserError(f"{file}: labels must be whole numbers from 0 to 2^31 - 1.")
            for start in range(0, len(images), CHUNK):
                part = slice(start, start + CHUNK)
                yield _rgb(images[part]), None if labels is None else labels[part].astype(np.int32)

    def _check(self, file: epath.Path) -> tuple[tuple[int, ...], bool]:
        """Shape of the images and whether there are labels, from the headers alone."""
        with _archive_errors(file), file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            members = set(archive.namelist())
            if "images.npy" not in members:
                keys = ", ".join(sorted(name.removesuffix(".npy") for name in members)) or "nothing"
                raise UserError(f"{file} needs an array `images`; it holds {keys}.")
            shape, dtype = _npy_header(archive, "images")
            labels = _npy_header(archive, "labels") if "labels.npy" in members else None
        rgb_or_grey = len(shape) == 3 or len(shape) == 4 and shape[3] == 3
        if dtype != np.uint8 or not rgb_or_grey:
            raise UserError(f"{file}: images is {dtype} {list(shape)}; it must be uint8 [n, Y, X, 3] or [n, Y, X].")
        if 0 in shape:
            raise UserError(f"{file}: images is empty, {list(shape)}.")
        if shape[1] != shape[2]:
            raise UserError(f"{file}: images are {shape[1]}x{shape[2]} pixels. Only square ones are taken: crop first.")
        if labels and (labels[0] != shape[:1] or labels[1].kind not in "iu"):
            raise UserError(f"{file}: labels is {labels[1]} {list(labels[0])}; it must be whole numbers [{shape[0]}].")
        return shape, labels is not None


@contextlib.contextmanager
def _archive_errors(file: epath.Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not a readable .npz archive ({reason}). Save it with numpy.savez.") from None


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, dtype


SOURCES: dict[str, Any] = {"digits": Digits, "synthetic": Synthetic, "npz": Npz}


def open_source(text: str, image_size: int, seed: int) -> Source:
    """The source that a config's `source` or `test_source` names: NAME or NAME:ARGUMENT.

    Args:
      text: as typed.
      image_size: of the config; 0: the source's own.
      seed: of pictures that are made up.

    Raises:
      UserError: unknown, missing, empty or unreadable; images not square, or smaller than image_size.
    """
    name, _, argument = text.partition(":")
    if name not in SOURCES:
        raise UserError(f"source {text!r} is not known. {nearest(name, list(SOURCES))}")
    source = SOURCES[name](argument, image_size, seed)
    if image_size > min(source.sizes):
        raise UserError(f"image_size={image_size}: {text!r} has images of {min(source.sizes)} pixels, which are "
                        f"never enlarged. Set image_size to {min(source.sizes)} or less.")
    return source


def resize(images_BYXC: np.ndarray, image_size: int) -> np.ndarray:
    """Square images uint8 made smaller: each new pixel is the mean of the area it covers (RESIZE_RULE)."""
    if images_BYXC.shape[1] == image_size:
        return images_BYXC
    size = (image_size, image_size)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images_BYXC])


def _rgb(images: np.ndarray) -> np.ndarray:
    """[B, Y, X, 3] of grey [B, Y, X], or of RGB itself."""
    return images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
