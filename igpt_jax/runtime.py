"""Around a job: devices and processes, precision, signals, its workdir's records and its exit code."""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from igpt_jax import checkpoint, launcher, startup, storage
from igpt_jax.config import UserError, to_dict
from igpt_jax.telemetry import say
from igpt_jax.watchdog import compiling

DONE, BUG, INPUT, PREEMPTED, DIVERGED, INTERRUPTED = 0, 1, 2, 75, 77, 130  # and watchdog.EXIT_CODE, 76
PEER = 134  # as JAX itself ends the survivors of a dead process, where no collective fails before
PEER_GONE = re.compile("gloo|connection|socket|peer", re.IGNORECASE)
FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
GRACE_SECONDS = 3.0  # for the main thread to hear a signal


class Ended(Exception):
    """A job ended before its end, with a message of one line, a status for result.json and an exit code."""
    status, code = "failed", INPUT

    def __init__(self, message: str, metrics: dict[str, Any] | None = None):
        super().__init__(message)
        self.metrics = metrics or {}


class Preempted(Ended):
    """The run was asked to stop and has saved its state. The message says at which step."""
    status, code = "preempted", PREEMPTED


class Diverged(Ended):
    """Losses or gradients stayed non-finite. The message says since when, and what to change."""
    status, code = "diverged", DIVERGED


# Start-up.

def initialize(saves: bool, **facts: Any) -> None:
    """Sets up the compilation cache and, where several processes run this job, connects them.

    A job that `saves` when it is asked to stop needs JAX's preemption service, which takes SIGTERM for itself. Call it
    before the first JAX computation.

    Args:
      facts: what all processes must agree on; `startup.agree` says how.

    Raises:
      UserError, startup.Elsewhere: the launcher's variables cannot be read, or the processes differ.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "igpt_jax", "compiled"))
    jax.config.update("jax_enable_preemption_service", saves)
    if launch := launcher.recognise(os.environ):
        startup.connect(launch)
        hosts = startup.agree(code=startup.code_digest(), versions=checkpoint.versions(), **facts)
        startup.introduce(launch, hosts)


def set_precision(precision: str) -> None:
    """Makes JAX keep to `precision` of the config: float32 without TF32 or bf16 passes, float64 with 64-bit types."""
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", None if precision == "bfloat16" else "highest")


# Signals.

class StopSignal:
    """Turns SIGINT (Ctrl-C) or SIGTERM into an orderly end; a second one, a second or more later, ends at once.

    While `saves` is false there is nothing to lose: the signal interrupts the job where it happens to be, and leaving
    the context raises Preempted; inside a compiler, which cannot be interrupted, the process ends by itself. Once
    `saves` is true a signal only makes `should_stop` true. (Launchers pass a SIGTERM on after a Ctrl-C: what follows
    within a second is the same request.)

    With several processes, JAX's preemption service hears SIGTERM on any of them and lets all stop at the same call of
    `should_stop`; SIGINT is passed on to it. Use it from the main thread.
    """

    def __init__(self, saves: bool = False):
        self.requested, self.saves = False, saves
        self._distributed = jax.distributed.is_initialized()
        self._asked, self._agreed, self._requested_at = 0, False, 0.0

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            if time.monotonic() - self._requested_at >= 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.requested, self._requested_at = True, time.monotonic()
        if self._distributed:
            say("saving, then stopping; press Ctrl-C again to stop at once")
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.saves:
            say("saving, then stopping; a second signal stops at once")
        else:
            raise KeyboardInterrupt

    def _end_compilation(self, pipe: int) -> None:
        """A thread that is told of signals while the main one, in C++, cannot be."""
        while os.read(pipe, 1):
            time.sleep(GRACE_SECONDS)
            if not self.saves and not self.requested and compiling():
                say("stopped while compiling, before there was anything to save. The same command starts again.")
                os._exit(PREEMPTED)

    def should_stop(self) -> bool:
        """Whether to save and stop now. All processes must ask equally often; the answer stays true."""
        if self._distributed and not self._agreed:
            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed if self._distributed else self.requested

    def __enter__(self) -> "StopSignal":
        # The preemption service has its own SIGTERM handler, which Python's would displace.
        signals = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
        self._former = {number: signal.signal(number, self._on_signal) for number in signals}
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._end_compilation, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and self.requested:
            raise Preempted("stopped before there was anything new to save.") from None


# One job.

def run_job(run: Callable[[Any, str], dict[str, Any]], config: Any, workdir: str) -> int:
    """Runs a job in its workdir and returns the exit code.

    Holds the workdir's lock, writes config.json first and result.json last; a workdir without result.json holds an
    unfinished job. Errors that the user can mend become one line.

    Args:
      run: the job: takes the config and the workdir, returns its metrics.
      config: the job's dataclass.
      workdir: local path, gs:// or s3://.
    """
    start = time.time()
    name = f"igpt_jax {config.job}"
    asked_to_stop, interrupted = threading.Event(), False

    def on_sigterm(number: int, frame: Any) -> None:
        asked_to_stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        initialize(saves=hasattr(config, "checkpoint_every_steps"), workdir=workdir, **to_dict(config))
        set_precision(getattr(config, "precision", "float32"))
        with _workdir_for(config, workdir) as folder:
            status, code, message = "done", DONE, ""
            try:
                metrics = run(config, workdir)
            except checkpoint.Unsaved as error:
                status, code, message, metrics = "failed", INPUT, str(error), {}
            except Ended as end:
                status, code, message, metrics = end.status, end.code, str(end), end.metrics
                message += " The same command goes on from there." if isinstance(end, Preempted) else ""
                interrupted = isinstance(end.__context__, KeyboardInterrupt)
            if jax.process_index() == 0:
                result = {"job": config.job, "status": status, "metrics": metrics, "device": _device(),
                          "versions": checkpoint.versions(), "wall_seconds": round(time.time() - start, 1)}
                say(f"{name}: {message or _summary(metrics)} [{folder / 'result.json'}]")
                storage.publish(folder / "result.json", to_json(result))
        if not interrupted:
            return code
    except startup.Elsewhere:
        code = INPUT
    except UserError as error:
        say(f"{name}: {error}")
        code = INPUT
    except startup.PeerMissing as error:
        say(f"{name}: {error}")
        code = PEER
    except KeyboardInterrupt:
        say(f"{name}: interrupted. The same command starts it again.")
        code, interrupted = PREEMPTED if asked_to_stop.is_set() else INTERRUPTED, True
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
            say(f"{name}: {error}. Make room, or give another --workdir.")
            code = INPUT
        elif jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and PEER_GONE.search(str(error)):
            say(f"{name}: another process is gone: {str(error).splitlines()[0]} The same command goes on from the "
                "newest checkpoint.")
            code = PEER
        else:
            say(traceback.format_exc())
            code = BUG
    if interrupted or jax.distributed.is_initialized():
        _leave(code)
    return code


@contextlib.contextmanager
def _workdir_for(config: Any, workdir: str) -> Iterator[storage.epath.Path]:
    """The workdir, locked and labelled by process 0; the others wait for its word."""
    folder = storage.path(workdir)
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(storage.lock(folder))
                storage.sweep(folder)
                stack.enter_context(_records(folder, config))
            except UserError as error:
                refusal = str(error)
            except (OSError, ImportError) as error:  # ImportError: the bucket's client is not installed
                refusal = f"workdir {workdir} cannot be written: {error}. Give another --workdir."
        startup.follow(refusal)
        yield folder


@contextlib.contextmanager
def _records(folder: storage.epath.Path, config: Any) -> Iterator[None]:
    """Writes config.json and removes result.json; where the job refuses the config, what was there comes back."""
    files = [folder / "config.json", folder / "result.json"]
    former = [file.read_text() if file.exists() else None for file in files]
    if former[0] is not None and (job := _job_of(former[0])) != config.job:
        owner = f"the job {job!r} (its config.json)" if job else "something else: its config.json is not a job's"
        raise UserError(f"workdir {folder} belongs to {owner}. Give {config.job!r} a --workdir of its own.")
    storage.publish(files[0], to_json(to_dict(config)))
    files[1].unlink(missing_ok=True)
    try:
        yield
    except UserError:
        for file, text in zip(files, former, strict=True):
            if text is None:
                file.unlink(missing_ok=True)
            else:
                storage.publish(file, text)
        raise


def _job_of(text: str) -> str | None:
    """The job that wrote a config.json; None where none did."""
    try:
        return json.loads(text)["job"]
    except (ValueError, KeyError, TypeError):
        return None


def _leave(code: int) -> None:
    """Ends the process at once: what an exception has interrupted, JAX's tracing for one, may crash while Python tidies
    up; and a failed process of several must not wait for the others, which may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGINT, signal.SIGTERM):  # launchers end the others when one has ended: the code is decided
        signal.signal(number, signal.SIG_IGN)
    if startup.coordinates():
        time.sleep(1)  # let the others report first
    os._exit(code)


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(),
            "processes": jax.process_count()}


def to_json(value: Any) -> str:
    """JSON with what JSON has no word for, NaN and infinities, as null."""
    text = json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's and JAX's scalars
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2) + "\n"


def _summary(metrics: dict[str, Any]) -> str:
    figures = [f"{name} {value:,.5g}" for name, value in metrics.items() if isinstance(value, int | float)]
    return f"done. {', '.join(figures)}"
