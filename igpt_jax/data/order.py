"""Computes which examples a step trains on, from (seed, step) alone. NumPy only.

**Keyed bijection.** Each epoch is an exact permutation of the examples. A shuffled list of ids would take memory and
time in proportion to n at every start, and a checkpoint would have to hold a position in it. A keyed bijection of
[0, n) computes the id at any position by itself, so a seek to any step is as fast as the next step and there is no
state to save. The bijection is a balanced Feistel network with cycle-walking (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002).

Example: n = 10, seed 0, epoch 0. The network permutes the smallest power of four that holds 10, which is 16:

    in     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    out    6 15  7 14  0  4 10  2  5  8 12  3 13 11  1  9

Position 0 reads example 6. Position 1 gives 15, which is no example, so 15 goes through the network again and gives 9.
Position 6 takes 10 -> 12 -> 13 -> 11 -> 3. The order of the epoch is 6 9 7 1 0 4 3 2 5 8.

**Hosts.** All hosts compute the same global batch and read slices of it. A run can therefore resume on a different
number of hosts and read the same examples.

**Windows of chunks.** Where small reads are slow, a store keeps several images in one chunk. Whole chunks are permuted
first, and then the examples within a window of chunks. Each chunk is read about once per epoch, and an epoch is still
an exact permutation.

**Mixtures.** Several components are mixed by a weighted round-robin. Each component has its own epochs.

Dimensions: B examples of a batch, W positions of one round-robin period.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

# Four rounds already look random on large domains (Luby and Rackoff, 1988). Small domains need more: with n = 10 a half
# has only two bits, and a round function only four inputs. Twelve cost little next to reading the examples.
ROUNDS = 12
MASK = 2**64 - 1

# Added to a seed, these give independent streams. Seeds are below 2^32, so two streams never share a seed.
AUGMENT_STREAM, WINDOW_STREAM, COMPONENT_STREAM = 2**32, 2**33, 2**34


@dataclasses.dataclass(frozen=True)
class Component:
    """Examples with an order of their own.

    Attributes:
      count: number of examples.
      weight: examples taken from this component out of every sum(weights) of the mixture.
      chunk: neighboring examples that are stored, and best read, together; 1: any order is equally fast.
    """
    count: int
    weight: int = 1
    chunk: int = 1


def batch(seed: int, step: int, batch_size: int, data: int | Sequence[Component], window: int = 0) -> np.ndarray:
    """The example ids of one global batch, int64 [batch_size].

    The run reads epoch after epoch, each in its own order. Batches are cut from that one sequence: a batch may begin in
    one epoch and end in the next, and no example is dropped.

    Args:
      seed: of the data order, in [0, 2^32).
      step: from 0.
      batch_size: examples over all hosts.
      data: the components, whose ids are numbered one after the other; an int: one component of that many examples.
      window: chunks whose examples are shuffled together; 0: any example may follow any other.
    """
    position_B = np.uint64(step * batch_size) + np.arange(batch_size, dtype=np.uint64)
    if isinstance(data, int):
        data = (Component(data),)
    owner_B, index_B = _round_robin(position_B, tuple(component.weight for component in data))
    ids_B, first = np.empty(batch_size, np.int64), 0
    for i, component in enumerate(data):
        mine = owner_B == i
        epoch, index = np.divmod(index_B[mine], np.uint64(component.count))
        ids_B[mine] = first + ordered(index, epoch, component, seed + i * COMPONENT_STREAM, window)
        first += component.count
    return ids_B


def _round_robin(position_B: np.ndarray, weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each position of the mixture: its component, and its position in that component's own sequence."""
    if len(weights) == 1:
        return np.zeros(len(position_B), np.int64), position_B
    owner_W, rank_W = _period(weights)
    period_B, offset_B = np.divmod(position_B, np.uint64(len(owner_W)))
    owner_B = owner_W[offset_B]
    # Each full period takes `weight` examples of a component. The rank counts those taken earlier in this period.
    return owner_B, period_B * np.array(weights, np.uint64)[owner_B] + rank_W[offset_B]


def read_before(position: int, data: Sequence[Component]) -> list[int]:
    """The number of examples of each component before `position` in the mixture."""
    weights = tuple(component.weight for component in data)
    owner_W, _ = _period(weights)
    period, offset = divmod(position, len(owner_W))
    inside = np.bincount(owner_W[:offset], minlength=len(data))
    return [period * weight + int(count) for weight, count in zip(weights, inside, strict=True)]


@functools.cache
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One round-robin period: the component of each of its sum(weights) positions, and the rank within that component.

    The k-th of a component's w examples is due at (k + 1/2) / w of the period. Sorting by due time spreads each
    component evenly, so that a batch of any size has nearly the weights' proportions.

    Example: weights (3, 1). Component 0 is due at 1/6, 3/6 and 5/6, component 1 at 1/2. On a tie the lower component
    comes first. The owners are 0 0 1 0, and the ranks are 0 1 0 2.
    """
    owner = np.repeat(np.arange(len(weights)), weights)
    rank = np.concatenate([np.arange(weight, dtype=np.uint64) for weight in weights])
    due = (rank + 0.5) / np.array(weights)[owner]
    by_due_time = np.argsort(due, kind="stable")
    return owner[by_due_time], rank[by_due_time]


def ordered(index: np.ndarray, epoch: np.ndarray, component: Component, seed: int, window: int) -> np.ndarray:
    """The examples of one component at positions `index` of epochs `epoch`, int64; `batch` explains `window`.

    An epoch is a row of slots, and a permutation of the chunks fills each slot with one chunk. A window is `window`
    neighboring slots. A second permutation, one per epoch and window, shuffles the positions within each window. A
    reader whose cache holds one window therefore reads every chunk once, although the examples come in random order.

    Example: 10 examples in chunks of 4, which are 0-3, 4-7 and 8-9; a window of 2 slots; seed 0, epoch 0. The slots are
    filled with chunks 1, 2 and 0. The first window has chunks 1 and 2 in the order 9 4 8 5 7 6, the second has chunk 0
    in the order 0 2 1 3.
    """
    n, chunk = component.count, component.chunk
    if window == 0 or chunk == 1:
        return permute(index, n, seed, epoch)
    chunks = -(-n // chunk)
    # The last chunk may lack some examples. The slot that it falls into is shorter by these, and later slots start
    # earlier, so that the slots cover [0, n) without a gap.
    missing = chunks * chunk - n
    index, short_slot = index.astype(np.int64), unpermute(np.full(index.shape, chunks - 1), chunks, seed, epoch)

    def start(slot: np.ndarray) -> np.ndarray:
        return slot * chunk - np.where(slot > short_slot, missing, 0)

    def slot_at(position: np.ndarray) -> np.ndarray:
        # Behind the short slot, adding the missing examples gives the position in a row of equally long slots.
        return np.where(position < start(short_slot + 1), position, position + missing) // chunk

    number = slot_at(index) // window
    low, high = start(number * window), start(np.minimum((number + 1) * window, chunks))
    shuffled = np.empty_like(index)
    # `permute` takes one n. There are few sizes: whole windows, the last one, and the one with the short slot.
    for size in np.unique(high - low):
        same = high - low == size
        # The windows of all epochs are numbered consecutively, so that each has its own permutation.
        key = epoch[same] * np.uint64(-(-chunks // window)) + number[same].astype(np.uint64)
        shuffled[same] = low[same] + permute((index - low)[same], int(size), seed + WINDOW_STREAM, key)
    slot = slot_at(shuffled)
    # The chunk that fills the slot, and the place inside it. The short slot holds the last chunk, so this never points
    # behind the last example.
    return permute(slot, chunks, seed, epoch) * chunk + shuffled - start(slot)


def permute(index: np.ndarray | int, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """The example at position `index` of an epoch: for each (seed, epoch) a bijection of [0, n).

    Args:
      index: in [0, n).
      n: at most 2^62.
      seed: any integer; its lowest 64 bits are used.
      epoch: from 0; one for all indices, or one for each.

    Returns:
      int64, of index's shape.
    """
    return _walk(index, n, seed, epoch, _feistel)


def unpermute(index: np.ndarray | int, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """The inverse of `permute`: the position of example `index`."""
    # A Feistel network is inverted by the same network with the round keys reversed and the halves swapped.
    def inverse(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
        return _swapped(_feistel(_swapped(value, half_bits), half_bits, keys[::-1]), half_bits)
    return _walk(index, n, seed, epoch, inverse)


def digest(ids: np.ndarray) -> int:
    """A number in [0, 2^64) that is the same for any order of the ids; other ids practically never have the same.

    It is the sum of each id's hash, modulo 2^64, so the digest of a whole is the sum of its parts' digests.
    """
    # The ids are mixed first. A sum of plain ids could not tell {1, 4} from {2, 3}.
    return int(_mix(np.asarray(ids).astype(np.uint64)).sum(dtype=np.uint64))


def draws(seed: int, position_B: np.ndarray, count: int) -> np.ndarray:
    """`count` random numbers for each position in the run's sequence of examples, uint64 [B, count].

    The numbers depend on the position, not on the batch or the host, so that augmentation is the same on any of these.
    """
    return _round_keys(seed + AUGMENT_STREAM, np.asarray(position_B, np.uint64), count).T


def _walk(index, n, seed, epoch, network) -> np.ndarray:
    """Applies `network`, a bijection of [0, 4^half_bits), as a bijection of [0, n)."""
    if not 1 <= n <= 2**62:
        raise ValueError(f"n={n} must lie in [1, 2^62]")
    index = np.asarray(index, np.uint64)
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, np.broadcast_to(np.asarray(epoch, np.uint64), index.shape).reshape(-1), ROUNDS)
    value = network(index.reshape(-1), half_bits, keys)
    # Cycle-walking: a value outside [0, n) goes through the network again until it falls inside. This is a bijection
    # too: each index moves along its own cycle of the network to the next element below n. The domain is the smallest
    # power of four that holds n, so it has at most 4n elements, and a walk takes at most four passes on average.
    while (outside := np.flatnonzero(value >= n)).size:
        value[outside] = network(value[outside], half_bits, keys[:, outside])
    return value.reshape(index.shape).astype(np.int64)


def _round_keys(seed: int, epoch: np.ndarray, rounds: int) -> np.ndarray:
    """The keys of each round and epoch, uint64 [rounds, len(epoch)]."""
    # The seed is mixed before the epoch joins it. With a plain sum or xor, epoch 1 of seed 0 could equal epoch 0 of
    # seed 1, and runs with neighboring seeds would read the same epochs.
    key = _mix(_mix(np.array([seed & MASK], np.uint64)) ^ epoch)
    return _mix(key + np.arange(1, rounds + 1, dtype=np.uint64)[:, None])


def _feistel(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network: a bijection of [0, 4^half_bits), because each round can be undone."""
    left, right = value >> half_bits, value & ((np.uint64(1) << half_bits) - np.uint64(1))
    for key in keys:
        # `right` is kept, so the round can be undone: the same hash of it, xored again, gives `left` back. The hash
        # itself need not be invertible.
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half_bits))
    return left << half_bits | right


def _swapped(value: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    """`value` with its upper and lower half_bits exchanged."""
    return (value & ((np.uint64(1) << half_bits) - np.uint64(1))) << half_bits | value >> half_bits


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014; constants: Stafford's variant 13), uint64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
