"""Standard streams, stop signals and missing packages of a process. Imports only the standard library."""

import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
from typing import TextIO

# Packages whose name on PyPI differs from the name that is imported.
ON_PYPI = {"absl": "absl-py", "etils": "'etils[epath]'", "orbax": "orbax-checkpoint", "PIL": "pillow",
           "sklearn": "scikit-learn"}


# Standard streams.

def open_streams() -> None:
    """Opens /dev/null in place of closed standard streams. Call it before any file is opened.

    Otherwise the next file that is opened gets the number of stdout or stderr, and C++ prints into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open() takes the lowest free number: this one
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        # Printing never fails on characters that the terminal's encoding lacks.
        stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line to `stream` (default: stdout). Never fails: the reader may be gone, or the disk full.

    For lines before a job starts; `metrics.logging.say` prints above a job's progress bar.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            say(f"igpt_jax: stdout cannot be written: {error}", sys.stderr)
        # Python flushes the stream again when it exits, and would fail then. /dev/null takes what is left.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Signals.

def stop_signals() -> list[int]:
    """The signals that ask a job to stop: Ctrl-C, and what schedulers send before a time limit or a preemption.

    Signals that the caller ignores stay ignored, such as SIGHUP under `nohup`.
    """
    sent = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    return [signal.SIGINT, signal.SIGTERM, *(each for each in sent if signal.getsignal(each) != signal.SIG_IGN)]


# Packages.

def missing_package(error: ModuleNotFoundError) -> str:
    """One line that says what to install. Empty where the missing module is ours or part of an installed package: that
    is a bug, not a missing package."""
    while error.name is None and isinstance(error.__cause__, ModuleNotFoundError):  # JAX raises its own, without a name
        error = error.__cause__
    name = (error.name or "").split(".")[0]
    if name in ("", "igpt_jax") or getattr(sys.modules.get(name), "__file__", None) or _installed(name):
        return ""
    clone = pathlib.Path(__file__).parent.parent
    rest = f", or everything that igpt_jax needs: pip install -e {clone}" if (clone / "setup.cfg").exists() else ""
    return f"the package {name} is not installed. Run: pip install {ON_PYPI.get(name, name)}{rest}"


def _installed(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        return found is not None and found.origin is not None  # None: an empty folder, left by an uninstalled package
    return False
