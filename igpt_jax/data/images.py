"""Decodes any picture to a square of uint8 RGB. Unusable pictures raise `Unusable` with the reason. No TensorFlow.

A *picture* is an encoded file, an *image* the decoded square. The rules, in the order in which they apply:

1. JPEG, PNG and WebP are accepted, detected from the file's content, not its name. A multi-picture JPEG (MPO) gives its
   first picture.
2. At most MAX_PIXELS, according to the header, before anything is decoded. Animations are rejected.
3. 16-bit channels keep their high byte. CMYK becomes RGB by Pillow's formula; color profiles are not applied.
   Palettes become colors, gray becomes three equal channels, and transparent pixels are pasted over white.
4. The EXIF rotation is applied. An unreadable EXIF block is ignored.
5. A square is cut from the rotated picture: the largest centered one, or the crop of a training augment. RESIZE_RULE
   reduces it. Nothing is enlarged.

Dimensions: Y rows, X columns, C channels.
"""

import contextlib
import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from etils import epath
from PIL import ExifTags, Image

from igpt_jax import storage

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 2**28
TOO_LARGE = f"larger than {MAX_BYTES >> 20} MiB"
MAX_PIXELS = 50_000_000  # 190 MiB per copy; Pillow holds at most three copies at once
LARGE_PIXELS = 2**23  # pictures with more pixels are decoded one at a time, to bound the memory of all threads
# Every fingerprint of a resized store covers this text, so not even its spelling may change.
RESIZE_RULE = "the largest centred square, then area: Pillow's BOX filter"

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB = 0, 2  # PNG's color types without palette and alpha
DROPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that can contain an orientation
MAX_TEXT = 2**20  # bytes
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation
QUIET = ("ignore", None, Warning, re.compile("PIL"), 0)

_one_large = threading.Lock()

Window = Callable[[int, int], tuple[int, int, int]]  # (width, height) of a picture -> (left, top, side) of a square


class Unusable(Exception):
    """A picture cannot be used; the message is the reason, for the quarantine list."""


def read(file: epath.Path) -> bytes:
    """The content of a picture file.

    Raises:
      Unusable: it cannot be read, or is too large.
    """
    # A pipe or device is never opened, because reading it could block forever.
    try:
        if storage.is_local(file):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable("not a regular file")
            if status.st_size > MAX_BYTES:
                raise Unusable(TOO_LARGE)
            if not status.st_size:  # the size of all files in /proc, some of which block like pipes
                return b""
        return file.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def decode(data: bytes, image_size: int, window: Window | None = None) -> np.ndarray:
    """uint8 [image_size, image_size, 3] of an encoded picture.

    Args:
      data: the picture's file content.
      image_size: pixels.
      window: chooses the square to crop from the rotated picture, at least image_size wide; None: the largest centered
        square.

    Raises:
      Unusable: with the reason.
    """
    if not data:
        raise Unusable("empty file")
    # Pillow warns of harmless metadata; sizes are checked below. catch_warnings is not thread-safe, and inserting the
    # filter again for every picture would cost time.
    if QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module="PIL")
    try:
        data, key = _png(data) if data.startswith(SIGNATURE) else (data, None)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _square(image, image_size, window, data, key)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unusable("not a JPEG, PNG or WebP picture") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged input
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def from_pillow(image: Image.Image, image_size: int) -> np.ndarray:
    """uint8 [image_size, image_size, 3] of an opened picture, by rules 2 to 5.

    Raises:
      Unusable: with the reason.
    """
    try:
        return _square(image, image_size)
    except Unusable:
        raise
    except Exception as error:  # as in `decode`
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _square(image: Image.Image, image_size: int, window: Window | None = None, data: bytes = b"",
            key: np.ndarray | None = None) -> np.ndarray:
    """Rules 2 to 5. `data` and `key` are those of `_as_rgb`."""
    _check(image, image_size)
    with _one_large if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
        image.load()
        rotated = _rotated(image, _as_rgb(image, data, key))
        left, top, side = (window or centered)(*rotated.size)
        box = (left, top, left + side, top + side)
        return np.asarray(rotated.resize((image_size, image_size), Image.Resampling.BOX, box=box))


def centered(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the largest centered square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def shrink(image_YXC: np.ndarray, image_size: int) -> np.ndarray:
    """Reduces a square uint8 image, RGB [Y, X, 3] or gray [Y, X], to uint8 [image_size, image_size, 3] by rule 5."""
    if image_YXC.ndim == 2:
        image_YXC = np.repeat(image_YXC[..., None], 3, axis=-1)
    if len(image_YXC) == image_size:
        return image_YXC
    return np.asarray(Image.fromarray(image_YXC).resize((image_size, image_size), Image.Resampling.BOX))


def _check(image: Image.Image, image_size: int) -> None:
    """Raises Unusable for a size or an animation that the rules reject."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise Unusable(f"animated: {image.n_frames} frames")
    if min(width, height) < image_size:
        raise Unusable(f"{width}x{height}: smaller than {image_size} pixels, and images are never enlarged")


def _rotated(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """`rgb` rotated by the EXIF orientation of `image`."""
    turn = None
    with contextlib.suppress(Exception):  # a damaged EXIF block
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return rgb if turn is None else rgb.transpose(turn)


def _as_rgb(image: Image.Image, data: bytes, key: np.ndarray | None) -> Image.Image:
    """A decoded picture as RGB, with transparent pixels over white.

    Args:
      data: the content that it was decoded from.
      key: the transparent color, from `_png`.
    """
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255
        rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if key is not None:
        rgb.paste("white", mask=Image.fromarray(_transparent(image, data, key)))
    return rgb


def _transparent(image: Image.Image, data: bytes, key: np.ndarray) -> np.ndarray:
    """Which pixels of a PNG have exactly the color `key`, in the PNG's own bit depth; bool [Y, X]."""
    depth = data[24]  # of the IHDR chunk, which always comes first
    if len(key) == 1:
        steps = 255 // (2**depth - 1) or 1  # Pillow scales fewer than 8 bits to 0..255
        return np.asarray(image.convert("L") if depth == 1 else image) == key * steps
    if depth == 8:
        return (np.asarray(image) == key).all(-1)
    # Pillow decodes only one byte of each 16-bit sample: the higher one, and with this tile argument the lower one.
    found = (np.asarray(image) == key >> 8).all(-1)
    with Image.open(io.BytesIO(data), formats=FORMATS) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        return found & (np.asarray(low) == key & 255).all(-1)


def _png(data: bytes) -> tuple[bytes, np.ndarray | None]:
    """A PNG without the chunks that Pillow mishandles, and its transparent color.

    - Texts and color profiles are dropped. They decide no pixel, but Pillow rejects large ones, and mistakes a text
      named like one of its own fields for that field.
    - The transparent color of gray and RGB (the tRNS chunk) is removed and returned, because Pillow compares it with
      samples of 8 bits, whatever the PNG's depth.

    Returns:
      The PNG, and the transparent color's samples in the PNG's own depth, uint16 [1] or [3]; None if it has none.
    """
    chunks, key, offset = [SIGNATURE], None, len(SIGNATURE)
    channels = {GRAY: 1, RGB: 3}.get(data[25]) if len(data) > 25 else None
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        start, end = offset + 8, offset + 12 + length
        if kind == b"tRNS" and channels and length >= 2 * channels and _intact(data[offset + 4:end]):
            key = np.frombuffer(data, ">u2", channels, start).astype(np.uint16) & (1 << data[24]) - 1
        elif kind not in DROPPED or _may_rotate(kind, data[start:min(end - 4, start + MAX_TEXT)]):
            chunks.append(data[offset:end])
        offset = end
    return b"".join([*chunks, data[offset:]]), key


def _may_rotate(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk can contain an orientation and is small enough for Pillow."""
    if not text.startswith(ORIENTED) or len(text) == MAX_TEXT:
        return False
    if kind == b"iTXt" and text[text.index(b"\0") + 1:][:1] == b"\0":  # not compressed
        return True
    inflater = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        inflater.decompress(text.split(b"\0", {b"zTXt": 2, b"iTXt": 4}.get(kind, 0))[-1], MAX_TEXT)
    return not inflater.unconsumed_tail


def _intact(chunk: bytes) -> bool:
    """Whether a PNG chunk, given without its length field, matches its checksum."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")
