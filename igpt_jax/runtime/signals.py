"""Stop signals: SIGTERM, Ctrl-C and the like become a save and exit code 75."""

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
STOPPING = "igpt_stopping"  # in the coordination service: a process ends before there is anything to save


# Start-up.

connected = threading.Event()  # to the other processes; a question to JAX's client before that aborts the process


# Signals.

class StopSignal:
    """Turns SIGINT (Ctrl-C), SIGTERM and others that schedulers send (`process.stop_signals`) into an orderly end; a
    second one, a second or more later, ends at once.

    While `saves` is false there is nothing to lose: the signal interrupts the job where it happens to be, and leaving
    the context raises Preempted. What cannot be interrupted, a compiler or the wait for other processes, is ended
    after GRACE_SECONDS, by a thread. Once `saves` is true a signal only makes `should_stop` true. (Launchers pass a
    SIGTERM on after a Ctrl-C: what follows within a second is the same request.)

    Of several processes one that is told tells the others, and from the first call of `should_stop` JAX's preemption
    service hears SIGTERM on any of them and lets all stop at the same call; SIGINT is passed on to it. Use it from the
    main thread; one may hold another.
    """

    def __init__(self, saves: bool = False):
        self.requested, self.saves = False, saves
        self._left = threading.Event()
        self._asked, self._agreed, self._requested_at = 0, False, 0.0

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            if time.monotonic() - self._requested_at >= 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.requested, self._requested_at = True, time.monotonic()
        if not self.saves:
            raise KeyboardInterrupt
        if self._asked:
            say("saving, then stopping; press Ctrl-C again to stop at once")
            os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service has taken
        else:
            say("saving, then stopping; a second signal stops at once")

    def _end_what_is_deaf(self, pipe: int) -> None:
        """A thread that is told of signals while the main one, in C++, cannot be."""
        while os.read(pipe, 1):
            if not self.saves:
                tell_others()
            if not self._left.wait(GRACE_SECONDS) and not self.saves:
                say("stopped before there was anything to save. The same command starts again.")
                leave(PREEMPTED)
        os.close(pipe)

    def _listen_to_others(self) -> None:
        """A thread, for as long as a process that is told would leave the others behind."""
        while not self._left.wait(GRACE_SECONDS / 2) and not self.saves:
            if signal.getsignal(signal.SIGINT) == self._on_signal and another_stops():
                return os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to save and stop now. All processes must ask equally often; the answer stays true."""
        if not connected.is_set():
            return self.requested
        if not self._asked:
            jax.config.update("jax_enable_preemption_service", True)
            jax_distributed.global_state.initialize_preemption_sync_manager()
            if self.requested:
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._agreed:
            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def __enter__(self) -> "StopSignal":
        self._former = {number: signal.signal(number, self._on_signal) for number in process.stop_signals()}
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._former_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._end_what_is_deaf, args=(read,), name="signals", daemon=True).start()
        threading.Thread(target=self._listen_to_others, name="others' signals", daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._former_pipe)
        os.close(self._pipe)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and self.requested:
            raise Preempted("stopped before there was anything new to save.") from None


def tell_others() -> None:
    """Lets the others know that this process ends before there is anything to save."""
    def tell() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax_distributed.global_state.client.key_value_set(STOPPING, "", allow_overwrite=True)

    if connected.is_set():  # the process that would pass it on may be frozen
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS)


def another_stops() -> bool:
    if connected.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has said so
            jax_distributed.global_state.client.key_value_try_get(STOPPING)
            return True
    return False


def leave(code: int) -> None:
    """Ends the process at once: tidying up takes Python a second of CPU time, and a preempted run has few; what an
    exception has interrupted, JAX's tracing for one, may crash meanwhile; and a failed process of several must not wait
    for the others, which may wait for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    if threading.current_thread() is threading.main_thread():
        for number in process.stop_signals():  # of launchers, when one process has ended: the code is decided
            signal.signal(number, signal.SIG_IGN)
    if connected.is_set() and startup.coordinates():
        time.sleep(3 * GRACE_SECONDS)  # let the others end first
    os._exit(code)
