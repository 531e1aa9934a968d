"""Arrays onto devices; and small sets, whose tokens all lie there and are gathered there. No TensorFlow.

Dimensions: B batch, T tokens, I images of the split.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from igpt_jax.data import augment, order
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


def batches(split: Split, table: np.ndarray, *, seed: int, batch_size: int, start_step: int, sharding: NamedSharding,
            recipe: str = "none", window: int = 0) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and its tokens int32 [B, T].

    Every process holds all tokens, so none needs another's; `sharding` is that of the tokens. A crop moves pixels and
    changes none, so it is done on tokens.
    """
    replicated, size = NamedSharding(sharding.mesh, PartitionSpec()), split.image_size

    def gather(tokens_IT: jax.Array, ids_B: jax.Array, places: tuple[jax.Array, ...]) -> jax.Array:
        tokens_BT = tokens_IT.at[ids_B].get(mode="promise_in_bounds").astype(jnp.int32)
        if places:
            rows_BY, columns_BX = places
            tokens_BYX = tokens_BT.reshape(-1, size, size)
            tokens_BYX = jnp.take_along_axis(tokens_BYX, rows_BY[:, :, None], axis=1)
            tokens_BT = jnp.take_along_axis(tokens_BYX, columns_BX[:, None, :], axis=2).reshape(tokens_BT.shape)
        return tokens_BT

    gather = jax.jit(gather, out_shardings=sharding)
    tokens_IT = put(load_tokens(split, table), replicated, split.count)
    step = start_step
    while True:
        ids_B = order.batch(seed, step, batch_size, split.components, window)
        places = ()
        if recipe == "cifar":
            places = augment.crop_and_mirror(seed, step * batch_size + np.arange(batch_size), size)
        yield ids_B, gather(tokens_IT, put(ids_B.astype(np.int32), replicated, batch_size),
                            tuple(put(place, replicated, batch_size) for place in places))
        step += 1
