"""Where a run's wall time goes: phase timing and goodput."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

PHASES = ("start", "compile", "input", "step", "save", "evaluate")


class PhaseTimer:
    """Adds up the seconds of a run by phase: `with timer("save"): ...`.

    Time outside of these blocks counts for the phase that `enter` started, which is `step` during training.

    Args:
      phase: the first phase, which begins now.
      clock: returns the time in seconds.
    """

    def __init__(self, phase: str = "start", clock: Callable[[], float] = time.monotonic):
        self._phase, self._clock, self._since = phase, clock, clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> str:
        """Ends the current phase, starts `phase`, and returns the phase that ended."""
        now, former = self._clock(), self._phase
        self._seconds[former] += now - self._since
        self._phase, self._since = phase, now
        return former

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        former = self.enter(phase)
        try:
            yield
        finally:
            self.enter(former)

    def read(self) -> dict[str, float]:
        """{"seconds/save": ...} of the phases that took time since the last `read`."""
        self.enter(self._phase)
        spent = {f"seconds/{phase}": round(seconds, 4) for phase, seconds in self._seconds.items() if seconds > 0}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return spent

    @property
    def unread(self) -> float:
        """Seconds since the last `read`."""
        return sum(self._seconds.values()) + self._clock() - self._since


def goodput(lines: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Seconds of wall time by phase, over all restarts of a run, from its metrics lines alone.

    Returns:
      `seconds/PHASE` of each phase; `seconds/lost`: work that a crash undid; `seconds/down`: from the last line of one
      process to the start of the next; `goodput`: the share of `seconds/step` in the sum of all these.
    """
    total: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("seconds/") and value is not None:
                total[name] = total.get(name, 0.0) + value
    wall = sum(total.values())
    return {**total, "goodput": total.get("seconds/step", 0.0) / wall} if wall else {}
