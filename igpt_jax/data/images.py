"""From any picture to a square of uint8 RGB, by stated rules; or a reason why not. No TensorFlow.

The rules, in the order in which they apply:

1. JPEG, PNG and WebP, told by their content, not their name. Of a multi-picture JPEG (MPO) the first picture.
2. At most MAX_PIXELS, read from the header before anything is decoded. No animations.
3. 16-bit channels keep their high byte. CMYK becomes RGB by Pillow's formula; colour profiles are not applied.
   Palettes become colours, grey becomes three equal channels, transparent pixels lie over white.
4. The EXIF rotation is applied; an EXIF block that cannot be read is as none.
5. The largest centred square, then RESIZE_RULE. Nothing is enlarged.

Shapes in names: B batch; Y rows, X columns, C channels.
"""

import contextlib
import io
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # 190 MiB each time that Pillow holds one, at most three times at once
LARGE_PIXELS = 2**23  # larger ones are decoded one at a time
RESIZE_RULE = "the largest centred square, then area: Pillow's BOX filter"

_one_large = threading.Lock()


class Unusable(Exception):
    """A picture that goes to quarantine; the message is the reason."""


def decode(data: bytes, image_size: int) -> np.ndarray:
    """uint8 [image_size, image_size, 3] of an encoded picture.

    Raises:
      Unusable: with the reason.
    """
    if not data:
        raise Unusable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless metadata; sizes are checked below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _square(image, image_size)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unusable("not a JPEG, PNG or WebP picture") from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged input
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _square(image: Image.Image, image_size: int) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise Unusable(f"animated: {image.n_frames} frames")
    if min(width, height) < image_size:
        raise Unusable(f"{width}x{height}: smaller than {image_size} pixels, and nothing is enlarged")
    with _one_large if width * height > LARGE_PIXELS else contextlib.nullcontext():
        image.load()
        left, top = (width - min(width, height)) // 2, (height - min(width, height)) // 2
        box = (left, top, left + min(width, height), top + min(width, height))
        small = _as_rgb(image).resize((image_size, image_size), Image.Resampling.BOX, box=box)
    with contextlib.suppress(Exception):  # a damaged EXIF block
        small.getexif().update(image.getexif())
        small = ImageOps.exif_transpose(small)  # turning the square after the crop is the same, and cheap
    return np.asarray(small)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def shrink(image_YXC: np.ndarray, image_size: int) -> np.ndarray:
    """A square uint8 RGB or grey array by rule 5, uint8 [image_size, image_size, 3]."""
    if image_YXC.ndim == 2:
        image_YXC = np.repeat(image_YXC[..., None], 3, axis=-1)
    if len(image_YXC) == image_size:
        return image_YXC
    return np.asarray(Image.fromarray(image_YXC).resize((image_size, image_size), Image.Resampling.BOX))
