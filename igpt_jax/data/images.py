"""Reads any picture into a square of uint8 RGB, by one set of rules, or says why it cannot. No TensorFlow.

The rules, in the order in which they apply:

1. JPEG, PNG and WebP, detected from the file's content, not its name. Of a multi-picture JPEG (MPO) the first picture.
2. At most MAX_PIXELS, read from the header before anything is decoded. No animations.
3. 16-bit channels keep their high byte. CMYK becomes RGB by Pillow's formula; color profiles are not applied.
   Palettes become colors, grey becomes three equal channels, transparent pixels lie over white.
4. The EXIF rotation is applied; an EXIF block that cannot be read counts as none.
5. A square of the turned picture: the largest centered one, or the crop that a training augment chose. RESIZE_RULE
   reduces it. Nothing is enlarged.

Shapes in names: B batch; Y rows, X columns, C channels.
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
MAX_PIXELS = 50_000_000  # 190 MiB each time that Pillow holds one, at most three times at once
LARGE_PIXELS = 2**23  # larger ones are decoded one at a time
RESIZE_RULE = "the largest centerd square, then area: Pillow's BOX filter"

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2  # PNG's color types without palette and alpha
PASSED_OVER = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that can hold an orientation
MAX_TEXT = 2**20  # bytes
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation
QUIET = ("ignore", None, Warning, re.compile("PIL"), 0)

_one_large = threading.Lock()

Window = Callable[[int, int], tuple[int, int, int]]


class Unusable(Exception):
    """A picture that goes to quarantine; the message is the reason."""


def read(file: epath.Path) -> bytes:
    """The content of a picture file.

    Raises:
      Unusable: it cannot be read, or is too large to be a picture. A pipe or device is never opened: that could wait
        without end.
    """
    try:
        if storage.is_local(file):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable("not a regular file")
            if status.st_size > MAX_BYTES:
                raise Unusable(TOO_LARGE)
            if not status.st_size:  # so says /proc of all its files, some of which wait as pipes do
                return b""
        return file.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def decode(data: bytes, image_size: int, window: Window | None = None) -> np.ndarray:
    """uint8 [image_size, image_size, 3] of an encoded picture.

    Args:
      window: from width and height of the turned picture to left, top and side of the square to take, which has at
        least image_size pixels; None: the largest centered square.

    Raises:
      Unusable: with the reason.
    """
    if not data:
        raise Unusable("empty file")
    if QUIET not in warnings.filters:  # catch_warnings is not for threads, and each new filter costs a little
        warnings.filterwarnings("ignore", module="PIL")  # about harmless metadata; sizes are checked below
    try:
        data, key = _png(data) if data.startswith(SIGNATURE) else (data, None)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, image_size)
            with _one_large if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
                image.load()
                turned = _turned(image, _as_rgb(image, data, key))
                left, top, side = (window or centered)(*turned.size)
                box = (left, top, left + side, top + side)
                return np.asarray(turned.resize((image_size, image_size), Image.Resampling.BOX, box=box))
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unusable("not a JPEG, PNG or WebP picture") from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged input
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def centered(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the largest centered square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def shrink(image_YXC: np.ndarray, image_size: int) -> np.ndarray:
    """A square uint8 RGB or grey array by rule 5, uint8 [image_size, image_size, 3]."""
    if image_YXC.ndim == 2:
        image_YXC = np.repeat(image_YXC[..., None], 3, axis=-1)
    if len(image_YXC) == image_size:
        return image_YXC
    return np.asarray(Image.fromarray(image_YXC).resize((image_size, image_size), Image.Resampling.BOX))


def _check(image: Image.Image, image_size: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise Unusable(f"animated: {image.n_frames} frames")
    if min(width, height) < image_size:
        raise Unusable(f"{width}x{height}: smaller than {image_size} pixels, and nothing is enlarged")


def _turned(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """`rgb` turned as the EXIF block of `image` says."""
    turn = None
    with contextlib.suppress(Exception):  # a damaged block
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return rgb if turn is None else rgb.transpose(turn)


def _as_rgb(image: Image.Image, data: bytes, key: np.ndarray | None) -> Image.Image:
    """A decoded picture as RGB over white.

    Args:
      data: what it was decoded from.
      key: of _png.
    """
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
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
    """Bool [Y, X]: the pixels of a PNG that have exactly the color `key`, in its own depth."""
    depth = data[24]
    if len(key) == 1:
        steps = 255 // (2**depth - 1) or 1  # Pillow spreads fewer bits than 8 over 0 to 255
        return np.asarray(image.convert("L") if depth == 1 else image) == key * steps
    if depth == 8:
        return (np.asarray(image) == key).all(-1)
    found = (np.asarray(image) == key >> 8).all(-1)
    with Image.open(io.BytesIO(data), formats=FORMATS) as low:  # Pillow gives one byte of two, here the lower
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        return found & (np.asarray(low) == key & 255).all(-1)


def _png(data: bytes) -> tuple[bytes, np.ndarray | None]:
    """A PNG without what decides no pixel, and its transparent color.

    Texts and color profiles are left out: Pillow refuses large ones, and believes those named like its own fields.
    The transparent color of grey and RGB (the tRNS chunk) is taken out, as Pillow compares it with samples of 8 bits.

    Returns:
      The PNG, and the transparent color's samples in its own depth, uint16 [1] or [3]; None where it has none.
    """
    kept, key, place = [SIGNATURE], None, len(SIGNATURE)
    channels = {GREY: 1, RGB: 3}.get(data[25]) if len(data) > 25 else None
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, end = place + 8, place + 12 + length
        if kind == b"tRNS" and channels and length >= 2 * channels and _intact(data[place + 4:end]):
            key = np.frombuffer(data, ">u2", channels, start).astype(np.uint16) & (1 << data[24]) - 1
        elif kind not in PASSED_OVER or _may_turn(kind, data[start:min(end - 4, start + MAX_TEXT)]):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]]), key


def _may_turn(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk's content can hold an orientation, in a size that Pillow takes."""
    if not text.startswith(ORIENTED) or len(text) == MAX_TEXT:
        return False
    if kind == b"iTXt" and text[text.index(b"\0") + 1:][:1] == b"\0":  # not compressed
        return True
    inflater = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        inflater.decompress(text.split(b"\0", {b"zTXt": 2, b"iTXt": 4}.get(kind, 0))[-1], MAX_TEXT)
    return not inflater.unconsumed_tail


def _intact(chunk: bytes) -> bool:
    """Whether a chunk, without its length, agrees with its checksum."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")
