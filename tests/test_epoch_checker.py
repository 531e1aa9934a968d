"""The check that every epoch reads each example exactly once."""

import numpy as np
import pytest

from igpt_jax.data import epoch_checker, order
from igpt_jax.data.epoch_checker import EpochChecker
from igpt_jax.data.order import Component

DATA = (Component(50, 1, 8), Component(20, 2))


def batches_of(start, stop):
    return [order.batch(4, step, 12, DATA, window=2) for step in range(start, stop)]


def test_epochs_are_checked_from_any_start():
    """Digests equal those of the ids in any order. Seen to fail with the earlier ids of an epoch left out."""
    for start in (0, 3, 7):
        checker = EpochChecker(4, start * 12, DATA, window=2)
        for ids in batches_of(start, 40):
            checker.add(ids)
        wholes = [order.digest(np.arange(50)), order.digest(np.arange(50, 70))]
        assert checker.epochs and all(digest == wholes[number] for number, _, digest in checker.epochs)
        last = [max(epoch for number, epoch, _ in checker.epochs if number == i) for i in (0, 1)]
        assert last == [40 * 12 // 3 // 50 - 1, 40 * 12 * 2 // 3 // 20 - 1]


def test_a_repeated_example_is_noticed():
    """Seen to fail without the comparison."""
    batches = batches_of(0, 40)
    batches[2][0] = batches[2][3]
    checker = EpochChecker(4, 0, DATA, window=2)
    with pytest.raises(RuntimeError, match="did not read each"):
        for ids in batches:
            checker.add(ids)


def test_a_long_interrupted_epoch_is_not_checked(monkeypatch):
    monkeypatch.setattr(epoch_checker, "RECOUNTED", 3)
    checker = EpochChecker(4, 36, DATA, window=2)
    for ids in batches_of(3, 40):
        checker.add(ids)
    assert min(epoch for number, epoch, _ in checker.epochs if number == 0) == 1
