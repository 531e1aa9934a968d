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
from jax._src import distributed as jax_distributed  # the coordination service's client has no public name
from jax.experimental import multihost_utils

from igpt_jax import checkpoint, launcher, process, side_files, startup, storage
from igpt_jax.config import UserError, to_dict
from igpt_jax.telemetry import say

DONE, BUG, INPUT, PREEMPTED, DIVERGED = 0, 1, 2, 75, 77  # and watchdog.EXIT_CODE, 76
PEER = 134  # as JAX itself ends the survivors of a dead process, where no collective fails before
PEER_GONE = re.compile("gloo|connection|socket|peer", re.IGNORECASE)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
# JAX's defaults. Each has an environment variable, which would make a resumed run, or a sample, another one.
PINNED = {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
          "jax_high_dynamic_range_gumbel": False, "jax_numpy_dtype_promotion": "standard",
          "jax_numpy_rank_promotion": "allow", "jax_disable_jit": False}
GRACE_SECONDS = 1.0  # for the main thread to hear a signal
STOPPING = "igpt_stopping"  # in the coordination service: a process ends before there is anything to save


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

_connected = threading.Event()  # to the other processes; a question to JAX's client before that aborts the process


def initialize(**facts: Any) -> None:
    """Sets up the compilation cache and, where several processes run this job, connects them. Call it before the first
    JAX computation.

    Args:
      facts: what all processes must agree on; `startup.agree` says how.

    Raises:
      UserError, startup.Elsewhere: the launcher's variables cannot be read, the processes differ, or the devices cannot
        be used.
      startup.PeerMissing: another process is gone.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "igpt_jax", "compiled"))
    if launch := launcher.recognise(os.environ):
        startup.connect(launch)
        _connected.set()
        hosts = startup.agree(code=startup.code_digest(), versions=checkpoint.versions(), **facts)
    startup.find_devices()
    if launch:
        startup.introduce(launch, hosts)


def set_precision(precision: str) -> None:
    """Makes JAX keep to `precision` of the config: float32 without TF32 or bf16 passes, float64 with 64-bit types; and
    to its defaults in all else that changes what it computes."""
    for name, value in PINNED.items():
        if getattr(jax.config, name, value) != value:  # a later JAX may have no choice there
            say(f"igpt_jax: {name.upper()} has no effect here, where results depend on the config and seed alone")
            jax.config.update(name, value)
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", None if precision == "bfloat16" else "highest")


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
                _tell_others()
            if not self._left.wait(GRACE_SECONDS) and not self.saves:
                say("stopped before there was anything to save. The same command starts again.")
                leave(PREEMPTED)
        os.close(pipe)

    def _listen_to_others(self) -> None:
        """A thread, for as long as a process that is told would leave the others behind."""
        while not self._left.wait(GRACE_SECONDS / 2) and not self.saves:
            if signal.getsignal(signal.SIGINT) == self._on_signal and _another_stops():
                return os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to save and stop now. All processes must ask equally often; the answer stays true."""
        if not _connected.is_set():
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


def _tell_others() -> None:
    """Lets the others know that this process ends before there is anything to save."""
    def tell() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax_distributed.global_state.client.key_value_set(STOPPING, "", allow_overwrite=True)

    if _connected.is_set():  # the process that would pass it on may be frozen
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS)


def _another_stops() -> bool:
    if _connected.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has said so
            jax_distributed.global_state.client.key_value_try_get(STOPPING)
            return True
    return False


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
    start, interrupted = time.time(), False
    name = f"igpt_jax {config.job}"
    try:
        with StopSignal():
            initialize(workdir=workdir, **to_dict(config))
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
            if _connected.is_set():
                jax.distributed.shutdown()  # waits for the others
                _connected.clear()
            return code
    except startup.Elsewhere:
        code = INPUT
    except UserError as error:
        say(f"{name}: {error}")
        code = INPUT
    except startup.PeerMissing as error:
        say(f"{name}: {error}")
        code = PEER
    except Preempted:
        say(f"{name}: interrupted. The same command starts it again.")
        code, interrupted = PREEMPTED, True
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            say(f"{name}: {error}. Make room, give the right to write there, or another --workdir.")
            code = INPUT
        elif isinstance(error, ModuleNotFoundError) and (missing := process.missing_package(error)):
            say(f"{name}: {missing}")
            code = INPUT
        elif jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and PEER_GONE.search(str(error)):
            if _another_stops():
                leave(PREEMPTED)
            say(f"{name}: another process is gone: {str(error).splitlines()[0]} The same command goes on from the "
                "newest checkpoint.")
            code = PEER
        else:
            say(traceback.format_exc())
            code = BUG
    if interrupted:
        _tell_others()
    if interrupted or _connected.is_set():
        leave(code)
    return code


@contextlib.contextmanager
def _workdir_for(config: Any, workdir: str) -> Iterator[storage.epath.Path]:
    """The workdir, locked and labelled by process 0; the others wait for its word."""
    folder = storage.path(workdir)
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                storage.absolute(folder)  # refuses where neither checkpoints nor stores could be written
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
    """Writes config.json and removes result.json; where the job refuses the config, what was there comes back.

    Either of them tells whose workdir it is. One that is not JSON is damaged, and is set aside.
    """
    files = [folder / "config.json", folder / "result.json"]
    told = {file.name: value for file in files if (value := side_files.load(file, object)) is not None}
    for name, value in told.items():
        job = value.get("job") if isinstance(value, dict) else None
        if job != config.job:
            owner = f"the job {job!r} (its {name})" if job else f"something else: its {name} is not a job's"
            raise UserError(f"workdir {folder} belongs to {owner}. Give {config.job!r} a --workdir of its own.")
    former = [storage.read(file) if file.exists() else None for file in files]
    storage.publish(files[0], to_json(to_dict(config)))
    files[1].unlink(missing_ok=True)
    try:
        yield
    except UserError:
        for file, data in zip(files, former, strict=True):
            if data is None:
                file.unlink(missing_ok=True)
            else:
                storage.publish(file, data)
        raise


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
    if _connected.is_set() and startup.coordinates():
        time.sleep(3 * GRACE_SECONDS)  # let the others end first
    os._exit(code)


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(),
            "processes": jax.process_count()}


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON with what JSON has no word for, NaN and infinities, as null."""
    text = json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's and JAX's scalars
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=indent) + "\n"


def _summary(metrics: dict[str, Any]) -> str:
    figures = [f"{name} {value:{',.0f' if isinstance(value, int) or abs(value) >= 1000 else '.5g'}}"
               for name, value in metrics.items() if isinstance(value, int | float)]
    return f"done. {', '.join(figures)}"
