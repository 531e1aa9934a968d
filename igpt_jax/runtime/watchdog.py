"""Ends a process that makes no progress, and prints the stacks of all its threads."""

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
from igpt_jax.runtime.exits import STUCK

COMPILER = os.path.join("jax", "_src", "compiler.py")  # a thread with a frame in it is compiling


class Watchdog:
    """Ends the process with exit code 76 if `beat` is not called for `allowance` seconds.

    Two kinds of time do not count: time in which a thread compiles, and time in which the process did not run, as on
    a laptop that slept.

    Before it ends, it prints the stacks of all threads. With several processes it also names those that are behind or
    do not respond; they report their progress through JAX's coordination service. If another process or its machine
    is dead, JAX itself ends this process, with exit code 134.

    Args:
      allowance: seconds without progress; 0: no limit.
    """

    def __init__(self, allowance: float):
        # Fifty ticks measure the allowance to 2 %. A tick is at most a second, so a laptop's sleep counts as two
        # seconds at most.
        self._allowance, self._tick = allowance, min(1.0, allowance / 50)
        self._doing, self._beats, self._seen, self._ticks = "starting", 0, 0, 0
        self._done = threading.Event()
        self._client = jax_distributed.global_state.client if jax.process_count() > 1 else None

    def beat(self, doing: str) -> None:
        """Reports progress.

        Args:
          doing: the activity that starts now, such as "step 40".
        """
        self._doing, self._beats = doing, self._beats + 1

    def _watch(self) -> None:
        """Adds up the time without a beat. Runs in a thread."""
        stalled, last = 0.0, time.monotonic()
        while not self._done.wait(self._tick):
            now = time.monotonic()
            stalled += min(now - last, 2 * self._tick)  # a longer gap means that the process itself did not run
            last = now
            self._ticks += 1
            if self._beats != self._seen or compiling():
                self._seen, stalled = self._beats, 0.0
            if stalled > self._allowance:
                self._end()

    def _publish(self) -> None:
        """Reports this process's progress to the others. Runs in a thread, since a frozen coordinator blocks it."""
        while not self._done.wait(5 * self._tick):
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"igpt_progress/{jax.process_index()}",
                                           f"{self._beats} {self._ticks} {self._doing}", allow_overwrite=True)

    def _end(self) -> None:
        """Prints what is stuck and ends the process."""
        say(f"igpt_jax: process {jax.process_index()} has made no progress for {self._allowance:g} s while "
            f"{self._doing}. Stacks of all threads:")
        # faulthandler writes to a file descriptor, which a replacement of sys.stderr may not have.
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if self._client:
            answer: list[str] = []
            # In a thread, with a deadline: process 0, which hosts the service, may be the one that is stuck.
            asking = threading.Thread(target=lambda: answer.append(self._stragglers()), daemon=True)
            asking.start()
            asking.join(12 * self._tick + 2)
            say(answer[0] if answer else "stuck: process 0, which coordinates the others, does not respond")
        say("igpt_jax: ended as stuck (exit code 76). The same command resumes from the newest checkpoint.")
        os._exit(STUCK)

    def _stragglers(self) -> str:
        """Names the processes that do not respond within 11 ticks; if all respond, those with the least progress."""
        def read() -> dict[str, list[str]]:
            return {name.rpartition("/")[2]: text.split(" ", 2)
                    for name, text in self._client.key_value_dir_get("igpt_progress/")}

        # Each process publishes every 5 ticks, so one that still runs changes its entry at least twice in 11.
        before = read()
        time.sleep(11 * self._tick)
        after = read()
        silent = [name for name, (_, ticks, _) in after.items()
                  if name in before and before[name][1] == ticks and name != str(jax.process_index())]
        fewest = min(int(beats) for beats, *_ in after.values())
        stuck = silent or [name for name, (beats, *_) in after.items() if int(beats) == fewest]
        how = " (does not respond)" if silent else ""
        return "stuck: " + "; ".join(f"process {name}, while {after[name][2]}{how}" for name in sorted(stuck, key=int))

    def __enter__(self) -> "Watchdog":
        if self._allowance:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self._client:
                threading.Thread(target=self._publish, name="watchdog reports", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()


def compiling() -> bool:
    """Whether any thread is inside JAX's compiler."""
    # Compilation takes minutes for large models and gives no sign of progress. The stacks show it without a hook in
    # JAX.
    for frame in sys._current_frames().values():
        while frame:
            if frame.f_code.co_filename.endswith(COMPILER):
                return True
            frame = frame.f_back
    return False
