"""Ends a process that does not move any more, and says where it stands."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination service's client has no public name

from igpt_jax.metrics.logging import say

EXIT_CODE = 76
COMPILER = os.path.join("jax", "_src", "compiler.py")  # a thread with a frame in it is compiling


class Watchdog:
    """Ends the process with exit code 76 where `beat` has not been called for `allowance` seconds.

    Time in which a thread compiles does not count, nor time in which this process did not run: a laptop that slept, a
    process that was stopped. Before it ends it prints the stacks of all threads, and with several processes which of
    them is behind or gives no sign of life: they tell each other through JAX's coordination service. Where the peer
    is dead or its machine is, JAX ends this process, with exit code 134 and its reasons.

    Args:
      allowance: seconds; 0: never.
    """

    def __init__(self, allowance: float):
        self._allowance, self._tick = allowance, min(1.0, allowance / 50)
        self._doing, self._beats, self._seen, self._ticks = "starting", 0, 0, 0
        self._done = threading.Event()
        self._client = jax_distributed.global_state.client if jax.process_count() > 1 else None

    def beat(self, doing: str) -> None:
        """Something has moved; `doing` is what comes next."""
        self._doing, self._beats = doing, self._beats + 1

    def _watch(self) -> None:
        stalled, last = 0.0, time.monotonic()
        while not self._done.wait(self._tick):
            now = time.monotonic()
            stalled += min(now - last, 2 * self._tick)
            last = now
            self._ticks += 1
            if self._beats != self._seen or compiling():
                self._seen, stalled = self._beats, 0.0
            if stalled > self._allowance:
                self._end()

    def _tell(self) -> None:
        """A thread of its own: where the coordinator is frozen, telling it anything takes for ever."""
        while not self._done.wait(5 * self._tick):
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"igpt_progress/{jax.process_index()}",
                                           f"{self._beats} {self._ticks} {self._doing}", allow_overwrite=True)

    def _end(self) -> None:
        say(f"igpt_jax: process {jax.process_index()} has not moved for {self._allowance:g} s while {self._doing}. "
            "Stacks of all threads:")
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if self._client:
            answer: list[str] = []
            asking = threading.Thread(target=lambda: answer.append(self._stragglers()), daemon=True)
            asking.start()
            asking.join(12 * self._tick + 2)
            say(answer[0] if answer else "stuck: process 0, which coordinates the others, gives no answer")
        say("igpt_jax: ended as stuck (exit code 76). The same command goes on from the newest checkpoint.")
        os._exit(EXIT_CODE)

    def _stragglers(self) -> str:
        """Which processes give no sign of life over 11 ticks; where all do, which have moved the least."""
        def read() -> dict[str, list[str]]:
            return {name.rpartition("/")[2]: text.split(" ", 2)
                    for name, text in self._client.key_value_dir_get("igpt_progress/")}

        before = read()
        time.sleep(11 * self._tick)
        after = read()
        silent = [name for name, (_, ticks, _) in after.items()
                  if name in before and before[name][1] == ticks and name != str(jax.process_index())]
        fewest = min(int(beats) for beats, *_ in after.values())
        stuck = silent or [name for name, (beats, *_) in after.items() if int(beats) == fewest]
        how = " (gives no sign of life)" if silent else ""
        return "stuck: " + "; ".join(f"process {name}, while {after[name][2]}{how}" for name in sorted(stuck, key=int))

    def __enter__(self) -> "Watchdog":
        if self._allowance:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self._client:
                threading.Thread(target=self._tell, name="watchdog's word", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()


def compiling() -> bool:
    """Whether any thread is inside JAX's compiler."""
    for frame in sys._current_frames().values():
        while frame:
            if frame.f_code.co_filename.endswith(COMPILER):
                return True
            frame = frame.f_back
    return False
