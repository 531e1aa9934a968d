"""Which examples a step trains on, as a function of (seed, step): no state, no files, no hosts. NumPy only.

Each epoch is an exact permutation of the examples, by a keyed bijection of [0, n): a balanced Feistel network over the
smallest power of four that holds n, walked until it lands below n (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). A seek to any step costs the same as the next one. Hosts take slices of the same global batch, so any
number of them trains on the same examples, and a run may go on with another number.

Where small reads are slow, whole blocks of neighbors are permuted, and then the examples within a window of blocks:
each block is read about once an epoch, and an epoch is an exact permutation still. Several components are mixed by a
weighted round-robin; each has epochs of its own.

Dimensions: B examples of a batch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

ROUNDS = 12
MASK = 2**64 - 1

# Independent streams of one seed. Seeds are below 2^32, so they never meet.
AUGMENT_STREAM, WINDOW_STREAM, COMPONENT_STREAM = 2**32, 2**33, 2**34


@dataclasses.dataclass(frozen=True)
class Component:
    """Examples with an order of their own.

    Attributes:
      count: how many.
      weight: of each sum(weights) examples of the mixture, this many come from here.
      block: neighbors that are best read together; 1: reads are random.
    """
    count: int
    weight: int = 1
    block: int = 1


def batch(seed: int, step: int, batch_size: int, data: int | Sequence[Component], window: int = 0) -> np.ndarray:
    """The example ids of one global batch, int64 [batch_size].

    The run reads epoch after epoch, each in its own order, and batches are cut from that one sequence: a batch may
    begin in one epoch and end in the next, and nothing is dropped.

    Args:
      seed: of the data order, in [0, 2^32).
      step: from 0.
      batch_size: examples over all hosts.
      data: the components; ids of the second follow on those of the first. A number: one component of that many.
      window: blocks that are shuffled together; 0: any example may follow on any other.
    """
    position_B = np.uint64(step * batch_size) + np.arange(batch_size, dtype=np.uint64)
    if isinstance(data, int):
        data = (Component(data),)
    owner_B, place_B = _round_robin(position_B, tuple(component.weight for component in data))
    ids_B, first = np.empty(batch_size, np.int64), 0
    for i, component in enumerate(data):
        mine = owner_B == i
        epoch, index = np.divmod(place_B[mine], np.uint64(component.count))
        ids_B[mine] = first + ordered(index, epoch, component, seed + i * COMPONENT_STREAM, window)
        first += component.count
    return ids_B


def _round_robin(position_B: np.ndarray, weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each position of the mixture its component, and the position in that component's own sequence."""
    if len(weights) == 1:
        return np.zeros(len(position_B), np.int64), position_B
    owner_W, rank_W = _period(weights)
    period, place = np.divmod(position_B, np.uint64(len(owner_W)))
    owner_B = owner_W[place]
    return owner_B, period * np.array(weights, np.uint64)[owner_B] + rank_W[place]


def given_before(position: int, data: Sequence[Component]) -> list[int]:
    """How many examples of each component come before `position` in the mixture."""
    weights = tuple(component.weight for component in data)
    owner_W, _ = _period(weights)
    period, place = divmod(position, len(owner_W))
    inside = np.bincount(owner_W[:place], minlength=len(data))
    return [period * weight + int(count) for weight, count in zip(weights, inside, strict=True)]


@functools.cache
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period of sum(weights) places, each component spread evenly: its owner, and how many of its own precede."""
    owner = np.repeat(np.arange(len(weights)), weights)
    rank = np.concatenate([np.arange(weight, dtype=np.uint64) for weight in weights])
    due = (rank + 0.5) / np.array(weights)[owner]
    by_time = np.argsort(due, kind="stable")
    return owner[by_time], rank[by_time]


def ordered(index: np.ndarray, epoch: np.ndarray, component: Component, seed: int, window: int) -> np.ndarray:
    """The examples of one component at places `index` of epochs `epoch`, int64; `batch` explains window.

    Slots are the places of blocks. The last block may be short: where it lands, later slots begin earlier.
    """
    n, block = component.count, component.block
    if window == 0 or block == 1:
        return permute(index, n, seed, epoch)
    blocks = -(-n // block)
    missing = blocks * block - n
    index, short = index.astype(np.int64), unpermute(np.full(index.shape, blocks - 1), blocks, seed, epoch)

    def start(slot: np.ndarray) -> np.ndarray:
        return slot * block - np.where(slot > short, missing, 0)

    def slot_at(place: np.ndarray) -> np.ndarray:
        return np.where(place < start(short + 1), place, place + missing) // block

    number = slot_at(index) // window
    low, high = start(number * window), start(np.minimum((number + 1) * window, blocks))
    place = np.empty_like(index)
    for size in np.unique(high - low):
        same = high - low == size
        key = epoch[same] * np.uint64(-(-blocks // window)) + number[same].astype(np.uint64)
        place[same] = low[same] + permute((index - low)[same], int(size), seed + WINDOW_STREAM, key)
    slot = slot_at(place)
    return permute(slot, blocks, seed, epoch) * block + place - start(slot)


def permute(index: np.ndarray | int, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Where the order of (seed, epoch) puts `index`: for each epoch a bijection of [0, n).

    Args:
      index: in [0, n).
      n: at most 2^62.
      seed: any integer; its lowest 64 bits count.
      epoch: from 0; one for all, or one for each index.

    Returns:
      int64, of index's shape.
    """
    return _walk(index, n, seed, epoch, _feistel)


def unpermute(index: np.ndarray | int, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """The inverse of `permute`."""
    def inverse(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
        return _swapped(_feistel(_swapped(value, half_bits), half_bits, keys[::-1]), half_bits)
    return _walk(index, n, seed, epoch, inverse)


def digest(ids: np.ndarray) -> int:
    """A number in [0, 2^64) that any order of the same ids shares, and other ids practically never do.

    The sum of a hash of each, so that digests of parts add up, modulo 2^64.
    """
    return int(_mix(np.asarray(ids).astype(np.uint64)).sum(dtype=np.uint64))


def draws(seed: int, position_B: np.ndarray, count: int) -> np.ndarray:
    """`count` random numbers for each position in the run's sequence of examples, uint64 [B, count]."""
    return _round_keys(seed + AUGMENT_STREAM, np.asarray(position_B, np.uint64), count).T


def _walk(index, n, seed, epoch, network) -> np.ndarray:
    if not 1 <= n <= 2**62:
        raise ValueError(f"n={n} must lie in [1, 2^62]")
    index = np.asarray(index, np.uint64)
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, np.broadcast_to(np.asarray(epoch, np.uint64), index.shape).reshape(-1), ROUNDS)
    value = network(index.reshape(-1), half_bits, keys)
    while (outside := np.flatnonzero(value >= n)).size:
        value[outside] = network(value[outside], half_bits, keys[:, outside])
    return value.reshape(index.shape).astype(np.int64)


def _round_keys(seed: int, epoch: np.ndarray, rounds: int) -> np.ndarray:
    """uint64 [rounds, len(epoch)]."""
    key = _mix(_mix(np.array([seed & MASK], np.uint64)) ^ epoch)
    return _mix(key + np.arange(1, rounds + 1, dtype=np.uint64)[:, None])


def _feistel(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network, a bijection of [0, 4^half_bits) whatever the round function is."""
    left, right = value >> half_bits, value & ((np.uint64(1) << half_bits) - np.uint64(1))
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half_bits))
    return left << half_bits | right


def _swapped(value: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    return (value & ((np.uint64(1) << half_bits) - np.uint64(1))) << half_bits | value >> half_bits


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014; constants: Stafford's variant 13), uint64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
