"""The order of examples: golden ids, exact permutations, seeks, uniformity."""

import time

import numpy as np
import pytest
from conftest import patience

from igpt_jax.data import order
from igpt_jax.data.order import Component


def test_golden_ids():
    """Recorded when the format was fixed: a change here changes the order of every interrupted run. Seen to fail with
    11 rounds."""
    assert order.batch(0, 0, 8, 1000).tolist() == [857, 306, 46, 217, 330, 992, 893, 107]
    assert order.batch(1, 10**9, 6, 10**6).tolist() == [340974, 368425, 698575, 907489, 664390, 989128]
    assert order.batch(7, 3, 4, 2**40).tolist() == [510588732437, 75850835074, 280102948094, 412989529908]
    assert order.batch(5, 2, 6, 5).tolist() == [4, 2, 1, 0, 4, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000])
def test_every_epoch_is_a_permutation(n):
    """Through batches that straddle epochs. Seen to fail without the cycle walk, and with the positions of a
    smaller batch."""
    sequence = np.concatenate([order.batch(3, step, 7, n) for step in range(n)]).reshape(-1, n)
    assert sequence.dtype == np.int64
    np.testing.assert_array_equal(np.sort(sequence, axis=1), np.broadcast_to(np.arange(n), sequence.shape))


def test_epochs_and_seeds_differ():
    """Seen to fail with the epoch left out of the round keys."""
    orders = {tuple(order.permute(np.arange(1000), 1000, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_large_n_is_one_to_one():
    n = 2**40 - 12345
    ids = order.permute(np.arange(100_000), n, seed=1, epoch=2)
    assert len(np.unique(ids)) == 100_000 and ids.min() >= 0 and ids.max() < n


def test_a_seek_is_instant():
    start = time.perf_counter()
    order.batch(0, 10**9, 128, 1_281_167)
    assert time.perf_counter() - start < patience(0.1)


@pytest.mark.parametrize("n", [3, 5, 16])
def test_positions_are_uniform(n):
    """Chi-square of the positions of each element, over 1,000 seeds and over 1,000 epochs, within 5 standard
    deviations. Seen to fail with 2 rounds."""
    runs, index = 1000, np.tile(np.arange(n), 1000)
    over_epochs = order.permute(index, n, 9, np.repeat(np.arange(runs), n))
    over_seeds = np.concatenate([order.permute(np.arange(n), n, seed, 0) for seed in range(runs)])
    for landed in (over_epochs, over_seeds):
        counts = np.bincount(index * n + landed, minlength=n * n)
        expected, freedom = runs / n, (n - 1) ** 2
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbors_are_independent():
    """Consecutive positions of one epoch are uncorrelated. Seen to fail with the identity as round function."""
    ids = order.permute(np.arange(20_000), 20_000, seed=4, epoch=0).astype(float)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(ids, np.arange(20_000))[0, 1]) < 0.03


def test_impossible_n():
    with pytest.raises(ValueError, match="n=0"):
        order.permute(0, 0, 0, 0)


@pytest.mark.parametrize(("n", "chunk", "window"), [(50, 8, 2), (50, 7, 3), (64, 8, 3), (5, 8, 1), (1000, 64, 4),
                                                    (17, 1, 3)])
def test_chunks_keep_epochs_exact(n, chunk, window):
    """For any size and slot of the last chunk. Seen to fail (in an endless loop) with `slot >= short` in start."""
    data = (Component(n, chunk=chunk),)
    for seed in range(4):
        epochs = np.concatenate([order.batch(seed, step, 10, data, window) for step in range(n)]).reshape(-1, n)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), epochs.shape))
        assert len({tuple(epoch) for epoch in epochs[:4]}) == 4


def test_a_window_reads_each_chunk_once():
    """Of 64 chunks of 16 examples, the examples of one window touch exactly `window` chunks. Seen to fail with
    window=0, which touches all."""
    n, chunk, window = 1024, 16, 4
    ids = np.concatenate([order.batch(2, step, 64, (Component(n, chunk=chunk),), window) for step in range(n // 64)])
    touched = [len(set(some_ids // chunk)) for some_ids in ids.reshape(-1, window * chunk)]
    assert touched == [window] * (n // (window * chunk))
    assert (np.diff(ids) == 1).mean() < 0.1


def test_unpermute_is_the_inverse():
    ids = np.arange(1000)
    for epoch in (0, 7):
        np.testing.assert_array_equal(order.unpermute(order.permute(ids, 1000, 3, epoch), 1000, 3, epoch), ids)


def test_mixtures():
    """Weights hold in every period, spread evenly; each component has exact epochs of its own; a seek is the same.
    Seen to fail with components sharing a stream of the seed (their orders agree)."""
    data = (Component(30, 1), Component(30, 3), Component(7, 2))
    ids = np.concatenate([order.batch(1, step, 12, data) for step in range(300)])
    owner = np.searchsorted([30, 60, 67], ids, side="right")
    np.testing.assert_array_equal(np.bincount(owner), np.array([1, 3, 2]) * len(ids) // 6)
    periods = owner.reshape(-1, 6)
    assert (periods == periods[0]).all() and (np.abs(np.diff(np.flatnonzero(periods[0] == 1)) - 2) <= 1).all()
    for i, (first, n) in enumerate([(0, 30), (30, 30), (60, 7)]):
        mine = ids[owner == i] - first
        epochs = mine[:len(mine) // n * n].reshape(-1, n)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), epochs.shape))
    assert not np.array_equal(ids[owner == 0][:30], ids[owner == 1][:30] - 30)
    np.testing.assert_array_equal(order.batch(1, 299, 12, data), ids[-12:])
    assert order.read_before(25, data) == [int((owner[:25] == i).sum()) for i in range(3)]


def test_a_seek_in_chunks_and_mixtures_is_instant():
    data = (Component(1_281_167, 1, 64), Component(10**8, 3, 64))
    start = time.perf_counter()
    ids = order.batch(0, 10**9, 128, data, window=1024)
    assert time.perf_counter() - start < patience(0.1) and len(np.unique(ids)) == 128


def test_draws_are_uniform_and_their_own():
    """Chi-square of the top byte over 2^14 positions, within 5 standard deviations; no draw repeats the order's
    keys. Seen to fail with positions in place of draws."""
    drawn = order.draws(3, np.arange(2**14), 3)
    for column in (drawn >> np.uint64(56)).T:
        counts = np.bincount(column.astype(int), minlength=256)
        assert abs(((counts - 64) ** 2 / 64).sum() - 255) < 5 * np.sqrt(2 * 255)
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(order.draws(3, np.array([5, 9]), 3), drawn[[5, 9]])
