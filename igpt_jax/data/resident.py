"""The in-memory reader for small splits, and placement of batches on devices. No TensorFlow.

Dimensions: B global batch, R its rows that this process reads, T tokens, I images of the split.
"""

import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from igpt_jax.data import augmentation, order
from igpt_jax.data.codecs import Codec
from igpt_jax.data.store import Split

READ_AT_ONCE = 8192  # images


def load_tokens(split: Split, codec: Codec) -> np.ndarray:
    """All tokens of a split, [I, T]."""
    starts = range(0, split.count, READ_AT_ONCE)
    ids = (np.arange(start, min(start + READ_AT_ONCE, split.count)) for start in starts)
    return np.concatenate([codec.encode(split.read(some_ids)) for some_ids in ids])


def process_rows(sharding: NamedSharding, count: int) -> slice:
    """The rows of a global array of `count` that this process's devices hold, with any rows that lie between these."""
    indices = sharding.addressable_devices_indices_map((count,)).values()
    bounds = [index[0].indices(count) for index in indices]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def put(rows: np.ndarray, sharding: NamedSharding, count: int) -> jax.Array:
    """Places a global array [count, ...] on the devices, from the `process_rows` of each process.

    Args:
      rows: this process's rows, any dtype. `sharding` splits the first dim; the other dims stay whole.
      sharding: of the global array.
      count: rows of the global array.
    """
    # jax.make_array_from_process_local_data cannot replace this. It rejects rows with gaps between them, which a host
    # has where its chips form a block of the torus. And it counts as an implicit transfer, which the training loop
    # disallows.
    first, shape = process_rows(sharding, count).start, (count, *rows.shape[1:])
    shards, devices = [], []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(count)
        shards.append(rows[start - first:stop - first])
        devices.append(device)
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.device_put(shards, devices))


def batches(split: Split, codec: Codec, *, seed: int, batch_size: int, start_step: int, rows: slice,
            augment: str = "none", window: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and tokens int32 [R, T] of its `rows`.

    The tokens stay in each process's memory. Gathering them on the device would save nothing: the ids would have to be
    transferred instead, and the gather would wait behind the training step.
    """
    tokens_IT = load_tokens(split, codec)
    for step in itertools.count(start_step):
        ids_B = order.batch(seed, step, batch_size, split.components, window)
        position_R = step * batch_size + np.arange(rows.start, rows.stop)
        tokens_RT = augmentation.augmented(augment, tokens_IT[ids_B[rows]], seed, position_R, codec)
        yield ids_B, tokens_RT.astype(np.int32)
