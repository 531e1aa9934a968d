"""Turns stop signals (SIGTERM, Ctrl-C and others) into a save and exit code 75."""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination service's client has no public name
from jax.experimental import multihost_utils

from igpt_jax import process
from igpt_jax.metrics.logging import say
from igpt_jax.runtime import startup
from igpt_jax.runtime.exits import PREEMPTED, Preempted

GRACE_SECONDS = 1.0  # for the main thread to hear a signal
STOPPING = "igpt_stopping"  # key in the coordination service: a process ends before there is anything to save

# Set once the processes are connected. Using JAX's client of the coordination service before then aborts the process.
connected = threading.Event()


class StopSignal:
    """Turns SIGINT (Ctrl-C), SIGTERM and other signals of schedulers (`process.stop_signals`) into an orderly end.

    - While `saves` is False there is nothing to save. A signal interrupts the job, and leaving the context raises
      Preempted. A thread ends a process that cannot be interrupted, such as one inside a compiler or one that waits
      for other processes, after GRACE_SECONDS.
    - Once `saves` is True, a signal only makes `should_stop` return True.
    - A second signal ends the process at once. Signals within a second count as one, since launchers send a SIGTERM
      after a Ctrl-C.

    With several processes, one that gets a signal tells the others. From the first call of `should_stop` on, JAX's
    preemption service takes SIGTERM on any process, and all processes stop at the same call; SIGINT is forwarded to it.

    Use it from the main thread. Contexts may be nested.

    Args:
      saves: the first value of `saves`.
      reply: what the job says it does on a signal.
    """

    def __init__(self, saves: bool = False, reply: str = "saving, then stopping"):
        self.requested, self.saves, self._reply = False, saves, reply
        self._left = threading.Event()
        self._asked, self._agreed, self._requested_at = 0, False, 0.0

    def _on_signal(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if self.requested:  # the second signal takes its default action, which ends the process
            if time.monotonic() - self._requested_at >= 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.requested, self._requested_at = True, time.monotonic()
        if not self.saves:
            # Python raises it wherever the main thread is, so the job's own clean-up runs. __exit__ turns it into
            # Preempted.
            raise KeyboardInterrupt
        if self._asked:
            say(f"{self._reply}; press Ctrl-C again to stop at once")
            os.kill(os.getpid(), signal.SIGTERM)  # handled by the preemption service, which informs all processes
        else:
            say(f"{self._reply}; a second signal stops at once")

    def _end_if_uninterruptible(self, pipe: int) -> None:
        """Handles signals while the main thread is inside C++, where Python's handlers do not run. Runs in a thread."""
        while os.read(pipe, 1):
            if not self.saves:
                tell_others()
            if not self._left.wait(GRACE_SECONDS) and not self.saves:
                say("stopped before there was anything to save. The same command starts over.")
                leave(PREEMPTED)
        os.close(pipe)

    def _listen_to_others(self) -> None:
        """Stops this process when another one stops before there is anything to save. Runs in a thread."""
        while not self._left.wait(GRACE_SECONDS / 2) and not self.saves:
            # Contexts may be nested. Only the innermost one, whose handler is installed, reacts.
            if signal.getsignal(signal.SIGINT) == self._on_signal and another_stops():
                return os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to save and stop now. Once True it stays True. All processes must call it equally often."""
        if not connected.is_set():
            return self.requested
        if not self._asked:
            # The service takes SIGTERM over, so it starts only now: before the first step, a stop must end the process
            # at once. A signal that came earlier is sent again, because the service has not seen it.
            jax.config.update("jax_enable_preemption_service", True)
            jax_distributed.global_state.initialize_preemption_sync_manager()
            if self.requested:
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._agreed:
            # The service lets all processes stop at the same number of calls, so each of them counts its calls.
            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def __enter__(self) -> "StopSignal":
        self._former = {number: signal.signal(number, self._on_signal) for number in process.stop_signals()}
        # The interpreter writes each signal's number to this pipe at once, even while the main thread is inside C++.
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._former_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_uninterruptible, args=(read,), name="signals", daemon=True).start()
        threading.Thread(target=self._listen_to_others, name="others' signals", daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._left.set()
        if self._asked:  # a later context, such as that of a study's next run, starts the service anew
            jax_distributed.global_state.preemption_sync_manager.shutdown()
            jax_distributed.global_state.preemption_sync_manager = None
        signal.set_wakeup_fd(self._former_pipe)
        os.close(self._pipe)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and self.requested:
            raise Preempted("stopped before there was anything new to save.") from None


def tell_others() -> None:
    """Tells the other processes that this one ends before there is anything to save."""
    def tell() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax_distributed.global_state.client.key_value_set(STOPPING, "", allow_overwrite=True)

    if connected.is_set():
        # In a thread, with a deadline: process 0, which hosts the service, may be frozen.
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS)


def another_stops() -> bool:
    """Whether another process has called `tell_others`."""
    if connected.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key is not set
            jax_distributed.global_state.client.key_value_try_get(STOPPING)
            return True
    return False


def leave(code: int) -> None:
    """Ends the process at once with an exit code, without Python's clean-up.

    Clean-up takes a second of CPU time, and a preempted run has few. It may crash if an exception interrupted JAX's
    tracing. And a failed process must not wait for others that may be waiting for it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of the stream is gone
            stream.flush()
    if threading.current_thread() is threading.main_thread():
        # A launcher signals the remaining processes when one has ended. That must not change this exit code.
        for number in process.stop_signals():
            signal.signal(number, signal.SIG_IGN)
    if connected.is_set() and startup.coordinates():
        time.sleep(3 * GRACE_SECONDS)  # the others abort if the service goes away before they have ended
    os._exit(code)
