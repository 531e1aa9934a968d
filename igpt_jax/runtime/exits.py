"""Exit codes, and the exceptions that lead to them."""

from typing import Any

DONE, BUG, INPUT, PREEMPTED, STUCK, DIVERGED = 0, 1, 2, 75, 76, 77
PEER = 134  # another process died; JAX itself aborts with this code if no collective fails first


class Ended(Exception):
    """A job stopped early. Holds a message of one line, a status for result.json and an exit code."""
    status, code = "failed", INPUT

    def __init__(self, message: str, metrics: dict[str, Any] | None = None):
        super().__init__(message)
        self.metrics = metrics or {}


class Failed(Ended):
    """A run met a fault, perhaps on this process alone, so that it must not wait for the others. Its files stay."""


class Preempted(Ended):
    """The run was asked to stop and has saved its state. The message names the step."""
    status, code = "preempted", PREEMPTED


class Diverged(Ended):
    """Losses or gradients stayed non-finite. The message says since which step, and what to change."""
    status, code = "diverged", DIVERGED


class Unsaved(Ended):
    """A state that had to be saved could not be saved. The message gives the reason and the newest step on disk."""
