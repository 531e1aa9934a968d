"""Sources of images. Each kind is one file here and one row of SOURCES."""

from igpt_jax import storage
from igpt_jax.config import UserError, nearest
from igpt_jax.data.sources import contents
from igpt_jax.data.sources.base import Item, Source
from igpt_jax.data.sources.digits import Digits
from igpt_jax.data.sources.folder import Folder
from igpt_jax.data.sources.npz import Npz
from igpt_jax.data.sources.synthetic import Synthetic
from igpt_jax.data.sources.tar import Tar
from igpt_jax.data.sources.tfds import Tfds

__all__ = ["Item", "Source", "open_source"]

SOURCES: dict[str, type[Source]] = {"digits": Digits, "synthetic": Synthetic, "npz": Npz, "folder": Folder, "tar": Tar,
                                    "tfds": Tfds}


def open_source(text: str, image_size: int, seed: int, shard: tuple[int, int] = (0, 1)) -> Source:
    """Opens a source.

    Args:
      text: the config's `source` or `test_source`: NAME or NAME:ARGUMENT.
      image_size: of the config, pixels; 0: the source's own, if its images have one size.
      seed: of synthetic pictures.
      shard: (i, n): slice i of n of the source, from 0.

    Raises:
      UserError: the source is unknown, missing, empty or unreadable; or image_size is missing or too large.
    """
    name, _, argument = text.partition(":")
    if name not in SOURCES:
        kind = {".npz": "npz", ".tar": "tar"}.get(storage.path(text).suffix, "folder")
        hint = f"Write {kind}:{text}" if "/" in text or storage.path(text).exists() else nearest(name, list(SOURCES))
        raise UserError(f"source {text!r} is not known. {hint}")
    source = SOURCES[name](argument, image_size, seed, shard)
    source.class_names = tuple(map(contents.nfc, source.class_names))  # names from two sources are compared
    if not source.count:
        raise UserError(f"source {text!r} has no images" + (f" in slice {shard[0]}/{shard[1]}. Use fewer slices."
                                                            if shard[1] > 1 else ". Check the path."))
    if source.sizes and image_size > min(source.sizes):
        raise UserError(f"image_size={image_size}: {text!r} has images of {min(source.sizes)} pixels. Images are "
                        f"never enlarged. Set image_size to {min(source.sizes)} or less.")
    if not source.sizes and not image_size:
        raise UserError(f"source {text!r} has pictures of different sizes. Set image_size, such as "
                        "--config.image_size=32.")
    return source
