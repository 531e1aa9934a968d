"""How tests run jobs and scripts. JAX sees one CPU device here; tests of several run in a process of their own."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import traceback

import forked
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "scripts"
# LLVM's optimizations take longer than they save in tests: test_sharding takes 235 s of CPU without them, 378 with.
UNOPTIMIZED = "--xla_backend_optimization_level=0"
ENVIRONMENT = {
    "XLA_FLAGS": UNOPTIMIZED,
    "JAX_PLATFORMS": "cpu",
    "EPATH_USE_TF": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # many jobs run the same small steps
    "TF_USE_LEGACY_KERAS": "1",  # TensorFlow then imports no Keras, a third of its import
    "IGPT_CACHE": str(ROOT / ".cache" / "igpt_jax"),
    "PYTHONPATH": str(ROOT),
}
LARGE = {"torch": "pip install '.[huggingface]'", "transformers": "pip install '.[huggingface]'",
         "tensorflow": "pip install ."}  # packages whose tests are skipped without them
# Scripts whose process must not have imported anything before: they hide packages or measure memory.
STARTS_PYTHON = ("conversion_memory.py", "readers_agree.py", "resident_memory.py", "run_exported.py",
                 "without_tensorflow.py")
# Files of few but long tests go first, so that none is left for one worker at the end.
LONG = ("test_processes", "test_faults", "test_finetune", "test_sharding", "test_scaling", "test_probe")
for name, value in ENVIRONMENT.items():  # before any test imports JAX
    os.environ.setdefault(name, value)
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # jobs inherit what the caller ignores, such as nohup's
    signal.signal(number, signal.SIG_DFL)
if importlib.util.find_spec("triton"):  # tests of one process import TensorFlow and transformers in any order
    from igpt_jax.weights.frameworks import triton_first

    triton_first()


def patience(seconds=60):
    """How long to wait for work that takes `seconds` on two idle cores before it counts as stuck, in seconds.

    Every time-out in a test comes from here. It only guards against hangs: a busy machine takes ten times as long.
    """
    return 20 * seconds


def fake_devices(count):
    """XLA's flags for so many CPU devices. They share two cores, so a collective may wait for long."""
    return (f"{UNOPTIMIZED} --xla_force_host_platform_device_count={count} "
            f"--xla_cpu_collective_call_terminate_timeout_seconds={patience()}")


def _skip_without_large():
    """Skips a test that imports a missing package of LARGE itself. The same import in our own code is a failure."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        frames = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        here = [frame for frame in frames if frame.is_relative_to(ROOT) and "site-packages" not in frame.parts]
        if error.name in LARGE and here[-1].parent == ROOT / "tests":
            pytest.skip(f"needs {error.name}: {LARGE[error.name]}")
        raise


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(lambda item: (yield from _skip_without_large()))
pytest_runtest_call = pytest.hookimpl(wrapper=True)(lambda item: (yield from _skip_without_large()))


def _run(command, devices, env):
    """Forks a job or script, unless it says how Python or JAX start, or asks what they import or hold."""
    environment = {**os.environ, "XLA_FLAGS": fake_devices(devices), **(env or {})}
    command = [str(word) for word in command]
    starts_python = command[0] == "-c" or pathlib.Path(command[0]).name in STARTS_PYTHON
    if starts_python or any(name.startswith(("JAX_", "TF_", "PYTHON", "MPL")) for name in env or {}):
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True,
                              timeout=patience())
    return forked.run(command, environment, ROOT, patience())


def script_command(script):
    """Python's arguments to run a script: the name of a file in tests/scripts, such as "meshes.py", or source text."""
    return [SCRIPTS / script] if script.endswith(".py") else ["-c", script]


def run_job_command(*arguments, script=None, devices=1, env=None):
    """`python -m igpt_jax ARGUMENTS`, or a script with these arguments (`script_command`), as a CompletedProcess."""
    return _run([*(script_command(script) if script else ["-m", "igpt_jax"]), *arguments], devices, env)


def run_all(*commands, **options):
    """[(exit code, standard error)] of jobs that run one after the other."""
    jobs = (run_job_command(*command, **options) for command in commands)
    return [(job.returncode, job.stderr) for job in jobs]


@pytest.fixture
def run_job():
    """`run_job_command` as a fixture."""
    return run_job_command


@pytest.fixture
def python():
    """python(script, *arguments, devices=8, env=None): runs a script (`script_command`) with fake devices; the test
    fails if it fails."""
    def run(script, *arguments, devices=8, env=None):
        done = _run([*script_command(script), *arguments], devices, env)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def store(folder):
    """A store of the digits, as `prepare` writes it; a module may have one of its own."""
    done = run_job_command("prepare", f"--workdir={folder / 'store'}")
    assert done.returncode == 0, done.stderr
    return folder / "store"
