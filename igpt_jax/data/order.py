"""Which examples a step trains on, as a function of (seed, step): no state, no files, no hosts. NumPy only.

Each epoch is an exact permutation of the examples, by a keyed bijection of [0, n): a balanced Feistel network over the
smallest power of four that holds n, walked until it lands below n (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). A seek to any step costs the same as the next one. Hosts take slices of the same global batch, so any
number of them trains on the same examples, and a run may go on with another number.
"""

import numpy as np

ROUNDS = 12
MASK = 2**64 - 1


def batch(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The example ids of one global batch, int64 [batch_size].

    The run reads epoch after epoch, each in its own order, and batches are cut from that one sequence: a batch may
    begin in one epoch and end in the next, and nothing is dropped.

    Args:
      seed: of the data order.
      step: from 0.
      batch_size: examples over all hosts.
      n: examples in the data.
    """
    epoch, position = divmod(step * batch_size, n)
    position_B = position + np.arange(batch_size, dtype=np.uint64)
    return permute(position_B % np.uint64(n), n, seed, epoch + position_B // np.uint64(n))


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
    if not 1 <= n <= 2**62:
        raise ValueError(f"n={n} must lie in [1, 2^62]")
    index = np.asarray(index, np.uint64)
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, np.broadcast_to(np.asarray(epoch, np.uint64), index.shape).reshape(-1))
    value = _feistel(index.reshape(-1), half_bits, keys)
    while (outside := np.flatnonzero(value >= n)).size:
        value[outside] = _feistel(value[outside], half_bits, keys[:, outside])
    return value.reshape(index.shape).astype(np.int64)


def _round_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """uint64 [ROUNDS, len(epoch)]."""
    key = _mix(_mix(np.array([seed & MASK], np.uint64)) ^ epoch)
    return _mix(key + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None])


def _feistel(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network, a bijection of [0, 4^half_bits) whatever the round function is."""
    left, right = value >> half_bits, value & ((np.uint64(1) << half_bits) - np.uint64(1))
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half_bits))
    return left << half_bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014; constants: Stafford's variant 13), uint64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
