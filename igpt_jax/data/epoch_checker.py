"""Checks while a run reads its batches that every epoch has each example exactly once."""

from collections.abc import Sequence

import numpy as np

from igpt_jax.data import order
from igpt_jax.data.order import Component

RECOUNTED = 2**22  # at most this many examples of an interrupted epoch are digested again at the start; takes seconds
DIGESTED_AT_ONCE = 2**20


class EpochChecker:
    """Adds up the digests of the ids read, and compares each full epoch with the digest of all ids of its component.

    When a run resumes in the middle of an epoch, the ids that the epoch has read before are computed from the order. An
    epoch with more than RECOUNTED such ids is not checked.

    Attributes:
      epochs: (component, epoch, digest) of each epoch that was found exact.
    """

    def __init__(self, seed: int, start_position: int, data: Sequence[Component], window: int):
        self.epochs: list[tuple[int, int, int]] = []
        self._current: list[_Epoch] = []
        first = 0
        for i, (component, read) in enumerate(zip(data, order.read_before(start_position, data), strict=True)):
            self._current.append(_Epoch(i, first, component, read, seed + i * order.COMPONENT_STREAM, window))
            first += component.count

    def add(self, ids: np.ndarray) -> None:
        """Counts the ids of a batch; batches must come in order.

        Raises:
          RuntimeError: an epoch ended that did not have each example once.
        """
        for current in self._current:
            self.epochs += current.add(ids[(ids >= current.first) & (ids < current.first + current.component.count)])


class _Epoch:
    """The current epoch of one component: how many examples it has read, and their digest (None: not checked)."""

    def __init__(self, number: int, first: int, component: Component, read: int, seed: int, window: int):
        self.first, self.component, self._number = first, component, number
        self._epoch, self._count = divmod(read, component.count)
        self._digest: int | None = None
        self._whole: int | None = None
        if self._count <= RECOUNTED:
            index = np.arange(self._count, dtype=np.uint64)
            epoch = np.full(self._count, self._epoch, np.uint64)
            self._digest = order.digest(first + order.ordered(index, epoch, component, seed, window))

    def add(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Counts ids of this component; returns (component, epoch, digest) of the epochs that end with them."""
        ended = []
        while len(ids):
            now, ids = np.split(ids, [self.component.count - self._count])
            self._count += len(now)
            if self._digest is not None:
                # Digests add up in any order, so one number checks an epoch of any size. A set of its ids would take
                # gigabytes at 100 million examples.
                self._digest = (self._digest + order.digest(now)) % 2**64
            if self._count == self.component.count:
                if self._digest is not None:
                    if self._digest != self._expected():
                        raise RuntimeError(f"epoch {self._epoch} of component {self._number} did not read each of its "
                                           f"{self._count:,} examples once: digest {self._digest:#x}")
                    ended.append((self._number, self._epoch, self._digest))
                self._epoch, self._count, self._digest = self._epoch + 1, 0, 0
        return ended

    def _expected(self) -> int:
        """The digest of all ids of the component."""
        if self._whole is None:
            last = self.first + self.component.count
            starts = range(self.first, last, DIGESTED_AT_ONCE)
            self._whole = sum(order.digest(np.arange(i, min(i + DIGESTED_AT_ONCE, last))) for i in starts) % 2**64
        return self._whole
