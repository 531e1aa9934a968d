"""Arrays onto devices; and small sets, whose tokens all lie there and are gathered there. No TensorFlow.

Dimensions: B batch, T tokens, I images of the split.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from igpt_jax.data import order
from igpt_jax.data.store import Split, tokens_of

READ_AT_ONCE = 8192  # images


def load_tokens(split: Split, table: np.ndarray) -> np.ndarray:
    """All tokens of a split, uint16 [I, T]."""
    starts = range(0, split.count, READ_AT_ONCE)
    ids = (np.arange(start, min(start + READ_AT_ONCE, split.count)) for start in starts)
    return np.concatenate([tokens_of(split, table, some) for some in ids])


def process_rows(sharding: NamedSharding, count: int) -> slice:
    """The rows, of a global array of `count`, that this process's devices hold; all between, if they have gaps."""
    indices = sharding.addressable_devices_indices_map((count,)).values()
    bounds = [index[0].indices(count) for index in indices]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def put(rows: np.ndarray, sharding: NamedSharding, count: int) -> jax.Array:
    """The global array [count, ...] whose `process_rows` this process gives. The transfer is explicit.

    Args:
      rows: any dtype; its first dim is split by `sharding`, the others are whole.
    """
    first, shape = process_rows(sharding, count).start, (count, *rows.shape[1:])
    shards, devices = [], []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(count)
        shards.append(rows[start - first:stop - first])
        devices.append(device)
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.device_put(shards, devices))


def batches(split: Split, table: np.ndarray, *, seed: int, batch_size: int, start_step: int,
            sharding: NamedSharding) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and its tokens int32 [B, T].

    Every process holds all tokens, so none needs another's; `sharding` is that of the tokens.
    """
    replicated = NamedSharding(sharding.mesh, PartitionSpec())

    def gather(tokens_IT: jax.Array, ids_B: jax.Array) -> jax.Array:
        return tokens_IT.at[ids_B].get(mode="promise_in_bounds").astype(jnp.int32)

    gather = jax.jit(gather, out_shardings=sharding)
    tokens_IT = put(load_tokens(split, table), replicated, split.count)
    step = start_step
    while True:
        ids_B = order.batch(seed, step, batch_size, split.count)
        yield ids_B, gather(tokens_IT, put(ids_B.astype(np.int32), replicated, batch_size))
        step += 1
