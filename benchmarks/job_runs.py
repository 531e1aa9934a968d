"""Runs jobs for a comparison; a run that the same command has finished is not repeated."""

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import exits

from igpt_jax.runtime.exits import DIVERGED, DONE


def words(job: str, workdir: pathlib.Path, settings: Mapping[str, Any]) -> list[str]:
    """The job's command line, without the program."""
    return [job, f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in settings.items())]


def result(workdir: pathlib.Path) -> dict[str, Any]:
    """A run's result.json; empty if there is none."""
    file = workdir / "result.json"
    return exits.read_json(file) if file.exists() else {}


def finished(workdir: pathlib.Path, command: list[str]) -> bool:
    """Whether this very command has finished the run, or has diverged."""
    asked = workdir / "command.txt"
    return (asked.exists() and shlex.split(asked.read_text())[3:] == command
            and result(workdir).get("status") in ("done", "diverged"))


def run(job: str, workdir: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job unless it is finished. Returns the metrics of its result.json, {} where it diverged.

    Raises:
      SystemExit: with the job's exit code: it was stopped, and the same command resumes; or it was refused, for example
        because the workdir holds a run with other settings.
    """
    command = words(job, workdir, settings)
    if not finished(workdir, command):
        code = subprocess.run([sys.executable, "-m", "igpt_jax", *command]).returncode
        if code not in (DONE, DIVERGED):
            sys.exit(code)
    return result(workdir)["metrics"]
