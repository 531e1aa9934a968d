"""How tests run jobs and scripts. JAX sees one CPU device here; tests of several run in a process of their own."""

import os
import pathlib
import subprocess
import sys

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
for name, value in ENVIRONMENT.items():  # before any test imports JAX
    os.environ.setdefault(name, value)


def _run(command, devices, env, timeout):
    # 8 fake devices share 2 cores: a collective may wait for long before XLA may call it stuck.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = {**os.environ, "XLA_FLAGS": flags, **(env or {})}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=timeout)


def run_job_command(*arguments, script=None, devices=1, env=None, timeout=280):
    """`python -m igpt_jax ARGUMENTS`, or the source text of a script, as a CompletedProcess."""
    return _run(["-c", script] if script else ["-m", "igpt_jax", *arguments], devices, env, timeout)


@pytest.fixture
def run_job():
    """`run_job_command` as a fixture."""
    return run_job_command


@pytest.fixture
def python():
    """python(script, devices=8, env=None): runs the source text of a script with fake devices; fails if it fails."""
    def run(script, devices=8, env=None, timeout=280):
        done = _run(["-c", script], devices, env, timeout)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run
