"""Batches for training, from a pixel store, in an order that is a function of (seed, step).

Dimensions: B batch, T tokens.
"""

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from igpt_jax.config import UserError
from igpt_jax.data import resident
from igpt_jax.data.resident import process_rows, put
from igpt_jax.data.store import Split, tokens_of

__all__ = ["Batch", "process_rows", "put", "tokens_of", "train_batches"]

RESIDENT_BYTES = 256 * 2**20


class Batch(NamedTuple):
    """One step's examples.

    Attributes:
      step: from 0.
      ids: of the global batch in the split, int64 [B]; the same on every process.
      tokens: int32 [B, T], sharded.
    """
    step: int
    ids: np.ndarray
    tokens: jax.Array


def train_batches(split: Split, table: np.ndarray, *, reader: str, seed: int, batch_size: int, start_step: int,
                  sharding: NamedSharding, prefetch: int) -> Iterator[Batch]:
    """Yields batches without end, from `start_step` on. Both readers give the same ids and tokens.

    Args:
      split: to train on.
      table: lookup table of the palette, uint16 [2^24].
      reader: `tfdata`, `resident`, or `auto`: resident where the tokens take at most 256 MiB.
      seed: of the order.
      batch_size: B, images over all processes; must divide over the sharding.
      start_step: a seek costs nothing.
      sharding: of tokens [B, T]; each process reads only the rows that its devices hold.
      prefetch: batches that tfdata reads ahead.

    Raises:
      UserError: TensorFlow is needed and not installed; while iterating, an image is damaged on disk.
    """
    common = {"seed": seed, "batch_size": batch_size, "start_step": start_step}
    if _reader_for(split, reader) == "resident":
        return _resident_batches(split, table, sharding=sharding, **common)
    return _streamed_batches(split, table, sharding=sharding, prefetch=prefetch, **common)


def _reader_for(split: Split, reader: str) -> str:
    size = 2 * split.count * split.image_size**2
    if reader == "auto" and size <= RESIDENT_BYTES:
        return "resident"
    if reader != "resident" and importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"data.reader={reader}: {size / 2**20:,.0f} MiB of tokens are streamed by TensorFlow, which is "
                        "not installed. Run `pip install tensorflow-cpu`, or set data.reader=resident.")
    return "tfdata" if reader == "auto" else reader


def _resident_batches(split: Split, table: np.ndarray, *, start_step: int, **options) -> Iterator[Batch]:
    batches = resident.batches(split, table, start_step=start_step, **options)
    with contextlib.closing(batches):
        for step, (ids, tokens) in zip(itertools.count(start_step), batches, strict=False):
            yield Batch(step, ids, tokens)


def _streamed_batches(split: Split, table: np.ndarray, *, batch_size: int, start_step: int,
                      sharding: NamedSharding, **options) -> Iterator[Batch]:
    from igpt_jax.data import pipeline  # TensorFlow: 5 seconds and 665 MiB

    batches = pipeline.batches(split, table, batch_size=batch_size, start_step=start_step,
                               rows=process_rows(sharding, batch_size), **options)
    with contextlib.closing(batches):
        for step, (ids, tokens) in zip(itertools.count(start_step), batches, strict=False):
            yield Batch(step, ids, put(tokens, sharding, batch_size))
