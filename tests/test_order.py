"""The order of examples: golden ids, exact permutations, seeks, uniformity."""

import time

import numpy as np
import pytest

from igpt_jax.data import order


def test_golden_ids():
    """Written down when the format was fixed: a change here changes what every interrupted run reads next. Seen to
    fail with 11 rounds."""
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
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("n", [3, 5, 16])
def test_positions_are_uniform(n):
    """Chi-square of where each element lands, over 1,000 seeds and over 1,000 epochs, within 5 standard deviations.
    Seen to fail with 2 rounds."""
    runs, index = 1000, np.tile(np.arange(n), 1000)
    over_epochs = order.permute(index, n, 9, np.repeat(np.arange(runs), n))
    over_seeds = np.concatenate([order.permute(np.arange(n), n, seed, 0) for seed in range(runs)])
    for landed in (over_epochs, over_seeds):
        counts = np.bincount(index * n + landed, minlength=n * n)
        expected, freedom = runs / n, (n - 1) ** 2
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_independent():
    """Consecutive places of one epoch are uncorrelated. Seen to fail with the identity as round function."""
    ids = order.permute(np.arange(20_000), 20_000, seed=4, epoch=0).astype(float)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(ids, np.arange(20_000))[0, 1]) < 0.03


def test_impossible_n():
    with pytest.raises(ValueError, match="n=0"):
        order.permute(0, 0, 0, 0)
