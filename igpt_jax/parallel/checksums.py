"""Checksums of sharded arrays: one uint32 per array, computed on the devices that hold it.

A checksum depends on the array's bits and shape alone. The mesh and the order of summation do not change it. A single
changed element always changes the checksum; other damage goes unseen with a chance of 2^-32. `odd_devices` compares
the copies of replicated arrays in the same way.

Letters of dims: M devices, A arrays.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from igpt_jax.parallel.trees import by_name

# The words that an array's items are read as, by the size of an item in bytes. 8 bytes become two words.
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def of_array(x: jax.Array) -> jax.Array:
    """The checksum of one array of any shape and dtype, uint32 []."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = _mixed(jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32))
    # Each round reduces the first dim: the word at index i is multiplied by 2 i + 1, then the products are summed.
    #
    # The weights differ, so a permutation of the words changes the sum. They are odd, because an odd factor has an
    # inverse modulo 2^32: a change of one word by d changes the sum by (2 i + 1) d, which is not 0. With an even
    # weight the highest bit of d would be lost. `_mixed` is a bijection too, so a single change survives every round.
    #
    # One round per dim instead of one weight per element of the whole array, because XLA's CPU compiler makes it fast:
    # 0.1 s per GiB on 2 cores, against 0.6 s. Mixing between rounds is what makes the two dims of (i, j) differ:
    # without it the weight would be (2 i + 1)(2 j + 1), and a transposed array would look the same.
    #
    # Example without the mixing: [a, b, c] gives a + 3 b + 5 c, and [b, a, c] gives b + 3 a + 5 c. They differ by
    # 2 (b - a), which is 0 modulo 2^32 if a and b differ in the highest bit alone. The mixing moves that bit down.
    while words.ndim:
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, 0)
        words = _mixed(jnp.sum(words * (2 * index + 1), axis=0, dtype=jnp.uint32))
    return words


def _mixed(words: jax.Array) -> jax.Array:
    """A one-to-one map of words that spreads their high bits.

    The low bits of floats are often all zero, and a product modulo 2^32 moves bits up only. The shift brings high bits
    down first. Both steps can be inverted: x ^ (x >> 16) by repeating it, the product because the constant is odd.
    """
    return (words ^ (words >> 16)) * np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: no pattern in its bits


def of_host_array(x: np.ndarray) -> int:
    """`of_array` of an array in host memory or in a memory-mapped file; reads a few MiB at a time."""
    def words_of(rows: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(rows).view(np.dtype(WORDS[rows.dtype.itemsize]))
        return _mixed(words.reshape(*rows.shape, *[2] * (rows.dtype.itemsize == 8)))

    def weighted_sum(words: np.ndarray, first: int = 0) -> np.ndarray:
        index = np.arange(first, first + len(words), dtype=np.uint32).reshape(-1, *[1] * (words.ndim - 1))
        return np.sum(words * (2 * index + 1), axis=0, dtype=np.uint32)

    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^32
        if not x.ndim:
            words = words_of(x[None])[0]
        else:
            count = max(1, 2**20 // max(1, x[:1].size))
            # Sums modulo 2^32 can be split anywhere: `first` gives each part the weights that it has in the whole.
            sums = (weighted_sum(words_of(x[first:first + count]), first) for first in range(0, len(x), count))
            words = _mixed(sum(sums, start=np.zeros(words_of(x[:0]).shape[1:], np.uint32)))
        while words.ndim:
            words = _mixed(weighted_sum(words))
    return int(words)


def of_tree(tree: Any) -> dict[str, int]:
    """{"params/blocks/query_DNH": checksum} of every array of a tree, in one pass; equal on all processes."""
    return dict(zip(by_name(tree), _of_each(of_array, tree).tolist(), strict=True))


def not_finite(tree: Any) -> list[str]:
    """The names of a tree's arrays that hold a NaN or an infinity; equal on all processes."""
    return [name for name, finite in zip(by_name(tree), _of_each(_all_finite, tree), strict=True) if not finite]


def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _of_each(function: Any, tree: Any) -> np.ndarray:
    """`function` of every array of a tree, computed in one program and replicated over the arrays' mesh, if any."""
    leaves = jax.tree.leaves(tree)
    shardings = [leaf.sharding for leaf in leaves if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
    # Replicated, so that every process reads the same numbers and takes the same decision. Processes that decide
    # differently would wait for each other in the next collective.
    replicated = NamedSharding(shardings[0].mesh, PartitionSpec()) if shardings else None
    return np.asarray(_jitted(function, replicated)(leaves))


@functools.cache
def _jitted(function: Any, sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: jnp.stack([function(leaf) for leaf in leaves]), out_shardings=sharding)


def difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """The first array of `found` whose checksum is not the expected one; None where all agree."""
    return next((name for name, value in found.items() if expected.get(name) != value), None)


def odd_devices(tree: Any, mesh: Mesh) -> dict[str, list[str]]:
    """{array: devices} whose copy of a shard differs from the copy that most devices hold.

    Each device computes the checksums of its own shards, without communication. Where only two copies exist and they
    differ, both devices are named. Equal on all processes.

    Args:
      tree: arrays, all in NamedShardings of `mesh`.
    """
    named = by_name(tree)
    names = list(mesh.axis_names)
    sums_MA = _local_sums(mesh, tuple(leaf.sharding.spec for leaf in named.values()))(list(named.values()))
    sums_MA = np.asarray(multihost_utils.process_allgather(sums_MA, tiled=True))
    devices = list(mesh.devices.flat)  # in the order of `names`, as the rows of sums_MA are
    assert sums_MA.shape == (len(devices), len(named)), (sums_MA.shape, names)
    odd = {}
    for column, (name, leaf) in enumerate(named.items()):
        # Devices that hold the same slice of the array hold copies of it. Only those are compared.
        slices = leaf.sharding.devices_indices_map(leaf.shape)
        copies = defaultdict(list)
        for row, device in enumerate(devices):
            copies[str(slices[device])].append((int(sums_MA[row, column]), device))
        for group in copies.values():
            (most, count), *_ = Counter(value for value, _ in group).most_common(1)
            tie = 2 * count == len(group)
            if wrong := [f"{device} of process {device.process_index}" for value, device in group
                         if value != most or tie]:
                odd.setdefault(name, []).extend(wrong)
    return odd


@functools.cache
def _local_sums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """A function of arrays in `specs`: the checksum of each device's shard of each, uint32 [devices, arrays]."""
    def sums(leaves):
        return jnp.stack([of_array(leaf) for leaf in leaves])[None]

    # check_vma is off because the shards of a replicated array may differ here: that is what is looked for.
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(list(specs),),
                                 out_specs=PartitionSpec(mesh.axis_names), check_vma=False))
