"""How tests run jobs and scripts. JAX sees one CPU device here; tests of several run in a process of their own."""

import os
import pathlib
import subprocess
import sys
import traceback

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "EPATH_USE_TF": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "IGPT_CACHE": str(ROOT / ".cache" / "igpt_jax"),
    "PYTHONPATH": str(ROOT),
}
LARGE = {"torch": "pip install '.[huggingface]'", "transformers": "pip install '.[huggingface]'",
         "tensorflow": "pip install ."}  # what tests may be run without
for name, value in ENVIRONMENT.items():  # before any test imports JAX
    os.environ.setdefault(name, value)


def patience(seconds=60):
    """How long to wait for work that takes `seconds` on two idle cores before it counts as stuck, in seconds.

    Every time-out of a test comes from here and guards against hangs alone: a busy machine takes ten times as long.
    """
    return 20 * seconds


def fake_devices(count):
    """XLA's flags for so many CPU devices. They share two cores, so a collective may wait for long."""
    return (f"--xla_force_host_platform_device_count={count} "
            f"--xla_cpu_collective_call_terminate_timeout_seconds={patience()}")


def _skip_without_large():
    """Skips a test that imports one of LARGE itself where it is missing; in our own code that is a failure."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        frames = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        here = [frame for frame in frames if frame.is_relative_to(ROOT) and "site-packages" not in frame.parts]
        if error.name in LARGE and here[-1].parent == ROOT / "tests":
            pytest.skip(f"needs {error.name}: {LARGE[error.name]}")
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(lambda item: (yield from _skip_without_large()))
pytest_runtest_call = pytest.hookimpl(wrapper=True)(lambda item: (yield from _skip_without_large()))


def _run(command, devices, env):
    environment = {**os.environ, "XLA_FLAGS": fake_devices(devices), **(env or {})}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=patience())


def run_job_command(*arguments, script=None, devices=1, env=None):
    """`python -m igpt_jax ARGUMENTS`, or the source text of a script, as a CompletedProcess."""
    return _run(["-c", script] if script else ["-m", "igpt_jax", *arguments], devices, env)


@pytest.fixture
def run_job():
    """`run_job_command` as a fixture."""
    return run_job_command


@pytest.fixture
def python():
    """python(script, devices=8, env=None): runs the source text of a script with fake devices; fails if it fails."""
    def run(script, devices=8, env=None):
        done = _run(["-c", script], devices, env)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run
