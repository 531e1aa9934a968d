"""Runs one job, from start-up to exit code.

Locks the workdir, writes its config.json and result.json, and prints errors in one line.
"""

import contextlib
import dataclasses
import errno
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from igpt_jax import process, storage
from igpt_jax.config import PRECISIONS, UserError, precision_on, to_dict
from igpt_jax.config.keys import compiler_options_text
from igpt_jax.metrics.logging import say
from igpt_jax.runtime import launchers, startup
from igpt_jax.runtime.exits import BUG, DONE, INPUT, PEER, PREEMPTED, STUCK, Ended, Failed, Preempted
from igpt_jax.runtime.precision import set_precision
from igpt_jax.runtime.signals import StopSignal, another_stops, connected, leave, tell_others
from igpt_jax.runtime.versions import versions
from igpt_jax.storage import side_files, to_json

# JAX has no exception of its own for a collective that fails because another process is dead; its text says so.
PEER_GONE = re.compile("gloo|connection|socket|peer", re.IGNORECASE)
# What a person opens first of what a job left: the first of these that exists.
OPENED_FIRST = ("report.html", "figures/completions.png", "figures/samples.png", "figures/accuracy_by_layer.png",
                "figures/loss.png", "figures/before_after.png", "plan.txt", "result.json")
# Jobs that write all their files at the end. Until then the workdir of a former command stays as it is.
WRITE_AT_THE_END = ("plan", "probe", "report", "sample", "verify")
DENIED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")  # of a bucket
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def initialize(**facts: Any) -> None:
    """Sets up the compilation cache and connects the processes of the job. Call it before the first JAX computation.

    Args:
      facts: values on which all processes must agree; see `startup.agree`.

    Raises:
      UserError: the launcher's variables cannot be read, the processes differ, or the devices cannot be used.
      startup.Refused: the same, on processes other than process 0.
      startup.PeerMissing: another process does not answer.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "igpt_jax", "compiled"))
    if launch := launchers.recognize(os.environ):
        startup.connect(launch)
        connected.set()
        hosts = startup.agree(code=startup.code_digest(), versions=versions(), **facts)
    startup.find_devices()
    if launch:
        startup.introduce(launch, hosts)
    if idle := startup.unused_accelerator():
        say(idle)


def run_job(run: Callable[[Any, str], dict[str, Any]], config: Any, workdir: str, command: str = "") -> int:
    """Runs a job in its workdir and returns the exit code.

    Holds the workdir's lock, writes config.json and command.txt first and result.json last. A workdir without
    result.json holds an unfinished job. The jobs of WRITE_AT_THE_END replace a former command's files only at their
    end. Errors that the user can fix become one line on stderr; other errors print a stack trace.

    Args:
      run: the job: a function of config and workdir that returns metrics.
      config: the job's dataclass.
      workdir: local path, gs:// or s3://; empty for a job that writes nothing.
      command: the command line, for command.txt; empty: no such file.
    """
    interrupted, alone, code = False, False, DONE
    name = f"igpt_jax {config.job}"
    try:
        with StopSignal():
            initialize(workdir=workdir, **to_dict(config))
            try:
                run_in_workdir(run, config, workdir, command)
            except Ended as end:
                code, alone = end.code, isinstance(end, Failed)
                if alone and jax.process_index() != 0:  # process 0 has said so itself, if it knows
                    say(f"{name}: {end}")
                # The signal broke into the job, maybe in the middle of JAX's tracing: end without clean-up.
                interrupted = isinstance(end.__context__, KeyboardInterrupt)
        if not (interrupted or alone):
            if connected.is_set():
                jax.distributed.shutdown()  # waits for the others
                connected.clear()
            return code
    except Exception as error:
        code, message = _failure(error)
        interrupted = interrupted or isinstance(error, Preempted)
        if message:
            say(message if code == BUG else f"{name}: {message}")
    # Here the job was interrupted or failed. Other processes may wait for this one, and it must not wait for them.
    if interrupted:
        tell_others()
    if interrupted or connected.is_set():
        leave(code)
    return code


def _with_precision(config: Any, workdir: str) -> Any:
    """The config with precision=auto replaced: by what the run in the workdir has, else by the platform's."""
    if getattr(config, "precision", "") != "auto":
        return config
    precision = None
    with contextlib.suppress(UserError, OSError, ImportError):  # `_workdir_for` reports a workdir that cannot be used
        precision = (side_files.look(storage.path(workdir) / "config.json") or {}).get("precision")
    auto = precision_on("auto", jax.devices()[0].platform)
    return dataclasses.replace(config, precision=precision if precision in PRECISIONS else auto)


def run_in_workdir(run: Callable[[Any, str], dict[str, Any]], config: Any, workdir: str, command: str = ""
                   ) -> dict[str, Any]:
    """Runs a job in its workdir, locked: config.json is written first, result.json last. Returns the job's metrics.

    An empty workdir is for a job that writes nothing. `initialize` must have been called. A job calls this for another
    job that is a part of it.

    Raises:
      UserError: the job refused its input; the workdir is as it was.
      Ended: the job stopped early; result.json says so.
    """
    start = time.time()
    config = _with_precision(config, workdir)
    set_precision(getattr(config, "precision", "float32"))
    with _workdir_for(config, workdir, command) if workdir else contextlib.nullcontext() as folder:
        end = None
        try:
            metrics = run(config, workdir)
        except Ended as error:
            end, metrics = error, error.metrics
        if jax.process_index() == 0:
            result = {"job": config.job, "status": end.status if end else "done", "metrics": metrics,
                      "device": _device(), "versions": versions(), "wall_seconds": round(time.time() - start, 1)}
            message = f"{end} The same command resumes from there." if isinstance(end, Preempted) else end
            where = ""
            if folder:
                try:
                    if config.job in WRITE_AT_THE_END:
                        _publish_config(folder, config, command)
                    storage.publish(folder / "result.json", to_json(result))
                except OSError as error:
                    if not end:
                        raise
                    say(f"igpt_jax {config.job}: result.json could not be written: {error}")
                where = f" [{next((folder / file for file in OPENED_FIRST if (folder / file).exists()), folder)}]"
            say(f"igpt_jax {config.job}: {message or _summary(metrics)}{where}")
        if end:
            raise end
    return metrics


def _failure(error: Exception) -> tuple[int, str]:
    """(exit code, message) for an error that ended a job; call it while the error is handled.

    The message is one line, empty on processes that process 0 reports for, or the stack trace of a bug.
    """
    if isinstance(error, startup.Refused):
        return INPUT, ""
    if isinstance(error, UserError):
        return STUCK if storage.unreachable(error) and not DENIED.search(str(error)) else INPUT, str(error)
    if isinstance(error, startup.PeerMissing):
        return PEER, str(error)
    if isinstance(error, Preempted):
        return PREEMPTED, "interrupted. The same command starts it again."
    if isinstance(error, PermissionError):
        return INPUT, f"{error}. Allow access there, or name another path."
    # Orbax, TensorStore and TensorFlow have exceptions of their own for a full disk.
    if getattr(error, "errno", None) in UNWRITABLE or "No space left on device" in str(error):
        return INPUT, f"{next(iter(str(error).splitlines()))}. Free disk space, or give another --workdir."
    if isinstance(error, MemoryError):
        return INPUT, f"out of memory: {str(error) or 'too many examples at once'}. Ask for fewer."
    if not isinstance(error, jax.errors.JaxRuntimeError) and storage.unreachable(error):
        code = INPUT if DENIED.search(str(error)) else STUCK
        return code, f"the storage is out of reach: {str(error).splitlines()[0].rstrip('.')}. The same command resumes."
    if isinstance(error, ModuleNotFoundError) and (missing := process.missing_package(error)):
        return INPUT, missing
    if isinstance(error, ImportError) and isinstance(error.__cause__, ModuleNotFoundError):  # of a bucket's client
        return INPUT, f"{' '.join(str(error).split())}."
    if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and PEER_GONE.search(str(error)):
        if another_stops():  # the other process did not die: it was asked to stop, and so is this one
            leave(PREEMPTED)
        return PEER, (f"another process died: {str(error).splitlines()[0]} The same command resumes from the newest "
                      "checkpoint.")
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return INPUT, (f"out of device memory: {' '.join(str(error).split())[:200]}. Split the batch with "
                       "--config.images_per_pass (training) or a smaller --config.batch_size, or set "
                       "--config.model.remat=full. `plan` says what fits.")
    return BUG, traceback.format_exc()


@contextlib.contextmanager
def _workdir_for(config: Any, workdir: str, command: str) -> Iterator[storage.Path]:
    """Locks the workdir and writes its config.json and command.txt, on process 0; the other processes wait for it."""
    folder = storage.path(workdir)
    with contextlib.ExitStack() as stack:
        # The other processes learn of an error on process 0 by `follow`. Raised before it, they would wait for ever.
        refusal, cause = "", None
        if jax.process_index() == 0:
            try:
                storage.absolute(folder)  # raises UserError for a path that cannot hold checkpoints or stores
                stack.enter_context(storage.lock(folder))
                stack.enter_context(_config_and_result(folder, config, command))
                storage.sweep(folder)
            except UserError as error:
                refusal, cause = str(error), error.__cause__
            except (OSError, ImportError) as error:  # ImportError: the bucket's client is not installed
                refusal, cause = f"workdir {workdir} cannot be written: {error}. Give another --workdir.", error
        try:
            startup.follow(refusal)
        except UserError as error:
            raise error from cause
        yield folder


@contextlib.contextmanager
def _config_and_result(folder: storage.Path, config: Any, command: str) -> Iterator[None]:
    """Writes config.json and command.txt, and removes result.json. If the job raises UserError, all are restored.

    A job of WRITE_AT_THE_END leaves those of a former command as they are. config.json and result.json name the job
    that the workdir belongs to. A damaged file is set aside.

    Raises:
      UserError: the workdir belongs to another job, or its files are not of a job.
    """
    files = [folder / "config.json", folder / "result.json"]
    found = {file.name: value for file in files if (value := side_files.load(file, object)) is not None}
    for name, value in found.items():
        job = value.get("job") if isinstance(value, dict) else None
        if job != config.job:
            owner = f"the job {job!r} (its {name})" if job else f"something else: its {name} is not a job's"
            raise UserError(f"workdir {folder} belongs to {owner}. Give {config.job!r} a --workdir of its own.")
    if config.job in WRITE_AT_THE_END and "result.json" in found:
        yield
        return
    # A refused config, such as a typing error on a finished run, must leave that run's files as they were.
    files.append(folder / "command.txt")
    former = [storage.read(file) if file.exists() else None for file in files]
    _publish_config(folder, config, command)
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


def _publish_config(folder: storage.Path, config: Any, command: str) -> None:
    storage.publish(folder / "config.json", to_json(to_dict(config)))
    if command:
        storage.publish(folder / "command.txt", command + "\n")


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(),
            "processes": jax.process_count()}


def _summary(metrics: dict[str, Any]) -> str:
    figures = [f"{name} {value:{',.0f' if isinstance(value, int) or abs(value) >= 1000 else '.5g'}}"
               for name, value in metrics.items() if isinstance(value, int | float)]
    if options := metrics.get("compiler_options"):
        figures.append(f"compiled with {compiler_options_text(options)}")
    return f"done. {', '.join(figures)}".rstrip()
