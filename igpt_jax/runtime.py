"""Around a job: devices and processes, precision, signals, its workdir's records and its exit code."""

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax import __version__, storage
from igpt_jax.config import UserError, to_dict
from igpt_jax.telemetry import say

DONE, BUG, INPUT, PREEMPTED, DIVERGED, INTERRUPTED = 0, 1, 2, 75, 77, 130
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Preempted(Exception):
    """The run was asked to stop and has saved its state. The message says at which step."""


class Diverged(Exception):
    """Losses or gradients stayed non-finite. The message says since when, and what to change."""


# Start-up.

def initialize() -> None:
    """Sets up the compilation cache and, where several processes run this job, connects them.

    Processes find each other through IGPT_COORDINATOR (host:port), IGPT_PROCESSES and IGPT_PROCESS_ID, as
    `launch/local.sh` sets them, or through what JAX itself detects: srun with several tasks, GKE's TPU slices of
    several hosts, and with IGPT_COORDINATOR=auto whatever else JAX knows (TPU VMs, Open MPI). Call it before the first
    JAX computation.

    Raises:
      UserError: the IGPT_ variables are incomplete or are no numbers.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "igpt_jax", "compiled"))
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    coordinator = os.environ.get("IGPT_COORDINATOR", "auto" if several else "")
    if coordinator == "auto":
        _connect()
    elif coordinator:
        try:
            processes, process_id = int(os.environ["IGPT_PROCESSES"]), int(os.environ["IGPT_PROCESS_ID"])
        except (KeyError, ValueError):
            raise UserError("IGPT_COORDINATOR is set, so IGPT_PROCESSES and IGPT_PROCESS_ID must be numbers. "
                            "launch/local.sh sets all three; unset IGPT_COORDINATOR to run one process.") from None
        _connect(coordinator_address=coordinator, num_processes=processes, process_id=process_id)


def _connect(**arguments: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**arguments)


def set_precision(precision: str) -> None:
    """Makes JAX keep to `precision` of the config: float32 without TF32 or bf16 passes, float64 with 64-bit types."""
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", None if precision == "bfloat16" else "highest")


# Signals.

class StopSignal:
    """Turns SIGINT (Ctrl-C) or SIGTERM into `should_stop`; a further SIGINT ends the process at once.

    A further SIGTERM changes nothing: launchers pass one on after a Ctrl-C, and schedulers that lose patience kill.

    With several processes, JAX's preemption service hears SIGTERM on any of them and lets all stop at one step; SIGINT
    is passed on to it. Use it as a context manager, from the main thread: the former handlers return at the end.
    """

    def __init__(self):
        self.requested = False
        self._distributed = jax.distributed.is_initialized()
        # The preemption service has its own SIGTERM handler, which Python's would displace.
        signals = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
        self._former = {number: signal.signal(number, self._on_signal) for number in signals}

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested = True
            say("saving, then stopping; press Ctrl-C again to stop at once")
            if self._distributed:
                os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def requested_here(self) -> bool:
        """Whether a run of one process is asked to stop; several agree by `should_stop` alone."""
        return self.requested and not self._distributed

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop now, after `step` finished steps. All processes must ask at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._distributed else self.requested

    def close(self) -> None:
        """Puts the former signal handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


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
    try:
        initialize()
        set_precision(getattr(config, "precision", "float32"))
        with _workdir_for(config, workdir) as folder:
            status, metrics, message = "done", {}, ""
            try:
                metrics = run(config, workdir)
            except Preempted as stop:
                status, message = "preempted", f"{stop} The same command goes on from there."
            except Diverged as error:
                status, message = "diverged", str(error)
            if jax.process_index() == 0:
                result = {"job": config.job, "status": status, "metrics": metrics, "device": _device(),
                          "versions": _versions(), "wall_seconds": round(time.time() - start, 1)}
                storage.publish(folder / "result.json", to_json(result))
                say(f"{name}: {message or _summary(metrics)} [{folder / 'result.json'}]")
        return {"done": DONE, "preempted": PREEMPTED, "diverged": DIVERGED}[status]
    except _ElsewhereError:
        code = INPUT
    except UserError as error:
        say(f"{name}: {error}")
        code = INPUT
    except KeyboardInterrupt:
        say(f"{name}: interrupted. The same command starts it again.")
        code = INTERRUPTED
    except Exception:
        say(traceback.format_exc())
        code = BUG
    if jax.distributed.is_initialized():
        _leave(code)
    return code


class _ElsewhereError(Exception):
    """Process 0 has said why the job cannot start."""


@contextlib.contextmanager
def _workdir_for(config: Any, workdir: str) -> Iterator[storage.epath.Path]:
    """The workdir, locked and labelled by process 0; the others wait for its word."""
    folder = storage.path(workdir)
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(storage.lock(folder))
                stack.enter_context(_records(folder, config))
            except UserError as caught:
                error = caught
            except (OSError, ImportError) as caught:  # ImportError: the bucket's client is not installed
                error = UserError(f"workdir {workdir} cannot be written: {caught}. Give another --workdir.")
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
            raise error or _ElsewhereError
        if error:
            raise error
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
    """Ends a process of a failed job of several, which must not wait for the others: they may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)  # it hosts the coordination service: let the others report first
    os._exit(code)


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(),
            "processes": jax.process_count()}


def _versions() -> dict[str, str]:
    return {"igpt_jax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def to_json(value: Any) -> str:
    """JSON with what JSON has no word for, NaN and infinities, as null."""
    text = json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's and JAX's scalars
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2) + "\n"


def _summary(metrics: dict[str, Any]) -> str:
    figures = [f"{name} {value:,.5g}" for name, value in metrics.items() if isinstance(value, int | float)]
    return f"done. {', '.join(figures)}"
