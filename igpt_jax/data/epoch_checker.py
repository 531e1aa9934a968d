"""Proof that each epoch gives every example exactly once, kept while batches are given."""

from collections.abc import Sequence

import numpy as np

from igpt_jax.data import order
from igpt_jax.data.order import Component

RECOUNTED = 2**22  # examples of an interrupted epoch that are counted again at the start; seconds
AT_ONCE = 2**20


class EpochChecker:
    """Adds up the digests of the ids given; a full epoch's must be that of all ids of its component.

    Where a run goes on in the middle of an epoch, what that epoch has given before follows from the order. An epoch of
    which more than RECOUNTED examples were given before is not checked.

    Attributes:
      epochs: (component, epoch, digest) of each epoch that was checked.
    """

    def __init__(self, seed: int, start_position: int, data: Sequence[Component], window: int):
        self.epochs: list[tuple[int, int, int]] = []
        self._open: list[_Open] = []
        first = 0
        for i, (component, given) in enumerate(zip(data, order.given_before(start_position, data), strict=True)):
            self._open.append(_Open(i, first, component, given, seed + i * order.COMPONENT_STREAM, window))
            first += component.count

    def add(self, ids: np.ndarray) -> None:
        """Notes the ids of a batch, in order. Raises RuntimeError where an epoch ends that was not exact."""
        for part in self._open:
            self.epochs += part.add(ids[(ids >= part.first) & (ids < part.first + part.component.count)])


class _Open:
    """The current epoch of one component."""

    def __init__(self, number: int, first: int, component: Component, given: int, seed: int, window: int):
        self.first, self.component, self._number = first, component, number
        self._epoch, self._count = divmod(given, component.count)
        self._digest: int | None = None
        self._whole: int | None = None
        if self._count <= RECOUNTED:
            places = np.arange(self._count, dtype=np.uint64)
            epoch = np.full(self._count, self._epoch, np.uint64)
            self._digest = order.digest(first + order.ordered(places, epoch, component, seed, window))

    def add(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        ended = []
        while len(ids):
            now, ids = np.split(ids, [self.component.count - self._count])
            self._count += len(now)
            if self._digest is not None:
                self._digest = (self._digest + order.digest(now)) % 2**64
            if self._count == self.component.count:
                if self._digest is not None:
                    if self._digest != self._expected():
                        raise RuntimeError(f"epoch {self._epoch} of component {self._number} did not give each of its "
                                           f"{self._count:,} examples once: digest {self._digest:#x}")
                    ended.append((self._number, self._epoch, self._digest))
                self._epoch, self._count, self._digest = self._epoch + 1, 0, 0
        return ended

    def _expected(self) -> int:
        if self._whole is None:
            last = self.first + self.component.count
            starts = range(self.first, last, AT_ONCE)
            self._whole = sum(order.digest(np.arange(i, min(i + AT_ONCE, last))) for i in starts) % 2**64
        return self._whole
