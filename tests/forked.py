"""Runs a module or script in a process forked from one that has imported JAX, TensorFlow and the jobs.

These imports take 5 to 7 s of CPU, which is most of a short job's time, and the tests start some 200 of them. A fork is
a process of its own: it has its own arguments, environment, streams, devices and exit code. Tests of imports,
start-up and memory start Python itself.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([  # the server ignores a package that is missing; the job then reports it
    f"igpt_jax.jobs.{job}" for job in ("evaluate", "finetune", "prepare", "pretrain", "probe", "sample")]
    + ["tensorflow"])


def run(command: list[str], environment: dict[str, str], cwd: pathlib.Path, timeout: float
        ) -> subprocess.CompletedProcess:
    """As `subprocess.run` of `python COMMAND`, which is ["-m", module, ...] or [script, ...]."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [pathlib.Path(folder) / name for name in ("stdout", "stderr")]
        child = _server.Process(target=_run_here, args=(command, environment, str(cwd), *map(str, streams)))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(command, timeout)
        # A child killed before it opened its streams leaves no files.
        return subprocess.CompletedProcess(command, child.exitcode, *(
            stream.read_text() if stream.exists() else "" for stream in streams))


def _run_here(command: list[str], environment: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (as Python opens them)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = command, os.path.dirname(command[0])
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # Python runs these itself where it ends normally; multiprocessing does not
