"""What a process is given: standard streams, signals, installed packages. Imports the standard library alone."""

import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
from typing import TextIO

# Where a package has another name on PyPI than in an import.
ON_PYPI = {"absl": "absl-py", "etils": "'etils[epath]'", "orbax": "orbax-checkpoint", "PIL": "pillow",
           "sklearn": "scikit-learn"}


# Standard streams.

def open_streams() -> None:
    """Opens /dev/null in place of closed standard streams. Call it before any file is opened.

    Else the next file would get the free number, and in it what C++ prints to stdout or stderr.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opened as the lowest free number, which is this one
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal or locale without our letters, or a path's


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints to `stream` (stdout); goes on where that is impossible: nobody reads it any more, or its disk is full."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            tell(f"igpt_jax: stdout cannot be written: {error}", sys.stderr)
        with contextlib.suppress(OSError):  # Python would try again when it ends, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Signals.

def stop_signals() -> list[int]:
    """The signals that ask a job to stop: Ctrl-C, and what schedulers send before a time limit or a preemption.

    Those that the caller ignores stay ignored: SIGHUP under `nohup`.
    """
    sent = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    return [signal.SIGINT, signal.SIGTERM, *(each for each in sent if signal.getsignal(each) != signal.SIG_IGN)]


# Packages.

def missing_package(error: ModuleNotFoundError) -> str:
    """What to install, in one line; empty where a module of ours is missing, or of a package that is there: a bug."""
    while error.name is None and isinstance(error.__cause__, ModuleNotFoundError):  # JAX says it in its own words
        error = error.__cause__
    name = (error.name or "").split(".")[0]
    if name in ("", "igpt_jax") or getattr(sys.modules.get(name), "__file__", None) or _installed(name):
        return ""
    clone = pathlib.Path(__file__).parent.parent
    everything = f", or all that igpt_jax needs: pip install -e {clone}" if (clone / "setup.cfg").exists() else ""
    return f"the package {name} is not installed. Run: pip install {ON_PYPI.get(name, name)}{everything}"


def _installed(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        return found is not None and found.origin is not None  # not a namespace that another package has left
    return False
