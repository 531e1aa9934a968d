"""Samples the colors of a split to fit a palette on, and measures how well a palette reproduces a split.

Dimensions: B images, P pixels, V palette, C channels.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from igpt_jax.data import order, palette
from igpt_jax.data.store import Split

SAMPLE_IMAGES = 2**14
READ_AT_ONCE = 1024
# The sample is the start of an epoch that no run reaches. Epoch 0 would repeat the choice of held-out images.
SAMPLE_EPOCH = 2**40


def sample_ids(split: Split, seed: int, count: int = SAMPLE_IMAGES) -> np.ndarray:
    """Ids of at most `count` images, each equally likely. They fill whole chunks, which are fast to read."""
    (component,) = split.components
    index = np.arange(min(count, split.count))
    epoch = np.full(len(index), SAMPLE_EPOCH, np.uint64)
    return order.ordered(index, epoch, component, seed, window=1)


def sample_pixels(split: Split, seed: int) -> np.ndarray:
    """A sample of pixels, each equally likely, uint8 [P, 3]: at least 2 palette.FIT_PIXELS, or all of a small split."""
    ids, rng = sample_ids(split, seed), np.random.default_rng(seed)
    per_image = -(-2 * palette.FIT_PIXELS // len(ids))
    sampled = []
    for images in _read(split, ids):
        pixels_BPC = images.reshape(len(images), -1, 3)
        if per_image < pixels_BPC.shape[1]:
            chosen_BP = rng.integers(pixels_BPC.shape[1], size=(len(images), per_image))
            pixels_BPC = np.take_along_axis(pixels_BPC, chosen_BP[..., None], axis=1)
        sampled.append(pixels_BPC.reshape(-1, 3))
    return np.concatenate(sampled)


@dataclasses.dataclass(frozen=True)
class Report:
    """How well a palette reproduces a split; the content of palette.json.

    Attributes:
      colours: V, the palette's length.
      used: colors that occur in the measured images.
      psnr_db: 10 log10(255^2 / mean squared error over all pixels and channels of these images), dB; None: exact.
      images: number of images measured.
      most_used: fraction of the pixels that have the most frequent color.
      entropy_nats: entropy of the color frequencies, nats: the loss of a model that knows only these frequencies.
    """
    colours: int  # this spelling is part of palette.json's format
    used: int
    psnr_db: float | None
    images: int
    most_used: float
    entropy_nats: float


def report(split: Split, palette_VC: np.ndarray, seed: int) -> Report:
    """Measures a palette on up to SAMPLE_IMAGES images of a split."""
    table, ids = palette.lookup_table(palette_VC), sample_ids(split, seed)
    counts_V, squares, values = np.zeros(len(palette_VC), np.int64), 0, 0
    for images in _read(split, ids):
        tokens = palette.encode(images, table)
        counts_V += np.bincount(tokens.reshape(-1), minlength=len(palette_VC))
        difference = palette.decode(tokens, palette_VC).reshape(images.shape).astype(np.int64) - images
        squares, values = squares + int((difference**2).sum()), values + images.size
    share_V = counts_V / counts_V.sum()
    entropy = float(-(share_V[share_V > 0] * np.log(share_V[share_V > 0])).sum())
    psnr = float(10 * np.log10(255**2 * values / squares)) if squares else None
    return Report(len(palette_VC), int((counts_V > 0).sum()), psnr, len(ids), float(share_V.max()), entropy)


def _read(split: Split, ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), READ_AT_ONCE):
        yield split.read(ids[start:start + READ_AT_ONCE])
