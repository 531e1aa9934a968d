"""Users' habits: odd file names, environment variables, closed streams, signals and damaged files, in real runs.

Each run has four steps. Part of `make faults`; takes under three minutes on 2 cores.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, patience, run_job_command
from test_jobs import result

pytestmark = pytest.mark.fault
MODEL = ["--config.model.name=igpt_tiny", "--config.model.layers=1", "--config.model.embed=8", "--config.model.heads=1",
         "--config.batch_size=8", "--config.precision=float32", "--config.optimizer.warmup_steps=2",
         "--config.checkpoint_every_steps=2", "--config.keep_steps=()"]


@pytest.fixture
def pretrain(store):
    return lambda workdir, steps=4: ["pretrain", f"--workdir={workdir}", f"--config.data.store={store}", *MODEL,
                                     f"--config.steps={steps}"]


@pytest.fixture(scope="module")
def finished(folder, store):
    """The undisturbed run, with the TensorFlow reader; TensorFlow prints nothing."""
    done = run_job_command("pretrain", f"--workdir={folder / 'finished'}", f"--config.data.store={store}", *MODEL,
                           "--config.steps=4", "--config.data.reader=tfdata")
    assert done.returncode == 0 and not re.search(r"oneDNN|absl|^[IWE]\d{4}", done.stderr, re.MULTILINE), done.stderr
    return folder / "finished"


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items()
            if name.startswith(("train/nats", "eval/nats"))}


@pytest.mark.parametrize("name", ["run[1]", "a, b {c}*?", "cost$%$_^", "_hidden", "caf\udce9", "é 图", "a\\b"])
def test_names(folder, pretrain, name):
    """A workdir with this name can be trained in, verified, evaluated and reported, or is refused before training."""
    workdir = folder / "names" / name
    jobs = [pretrain(workdir), ["verify", f"--workdir={folder}/v-{name}", f"--config.path={workdir}"],
            ["evaluate", f"--workdir={folder}/e-{name}", f"--config.checkpoints={workdir}"],
            ["report", f"--workdir={folder}/r-{name}", f"--config.workdirs={workdir}"]]
    arguments = json.dumps([[os.fsencode(argument).decode("latin1") for argument in job] for job in jobs])
    done = run_job_command(arguments, script="jobs.py")
    if done.returncode == 2 and name in ("caf\udce9", "a\\b"):
        assert len(done.stderr.splitlines()) == 1 and not workdir.exists(), done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (workdir / "checkpoints" / "4").exists() and (workdir / "figures" / "loss.png").exists()
        assert all((folder / f"{job}-{name}" / "result.json").exists() for job in "ver")


@pytest.mark.parametrize("environment, code, message", [
    ({"MPLBACKEND": "module://matplotlib_inline.backend_inline", "JAX_DEFAULT_PRNG_IMPL": "rbg",
      "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DISABLE_JIT": "1", "MATPLOTLIBRC": "{folder}/matplotlibrc"},
     0, "has no effect here"),
    ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONOPTIMIZE": "2"}, 0, ""),
    ({"JAX_PLATFORMS": "cuda"}, 2, "JAX cannot use this machine's devices"),
    ({"JAX_PLATFORMS": "foo"}, 2, "Unset JAX_PLATFORMS, which is 'foo'"),
    ({"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache", "JAX_COMPILATION_CACHE_DIR": ""}, 0, ""),
], ids=["figures and random numbers", "plain C", "cuda", "foo", "no home"])
def test_environment(folder, finished, pretrain, environment, code, message, request):
    """The environment does not change the losses, or the run ends with one line that says what to do."""
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    workdir = folder / request.node.callspec.id
    environment = {name: value.format(folder=folder) for name, value in environment.items()}
    done = run_job_command(*pretrain(workdir), env=environment)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    else:
        assert losses(workdir) == losses(finished)


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", "> /dev/full 2>&1", "2>&1 | head -n 1"],
                         ids=["closed", "full", "unread"])
def test_streams(folder, finished, pretrain, streams, request):
    """Streams that are closed, full or no longer read do not change the run."""
    workdir = folder / f"streams-{request.node.callspec.id}"
    command = shlex.join([sys.executable, "-m", "igpt_jax", *pretrain(workdir)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {streams}"], cwd=ROOT, timeout=patience())
    assert done.returncode == 0 and losses(workdir) == losses(finished)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_schedulers_and_terminals(folder, pretrain, number):
    """The run saves and ends with exit code 75."""
    workdir = folder / number.name
    with subprocess.Popen([sys.executable, "-m", "igpt_jax", *pretrain(workdir, steps=1_000_000)], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 1/"):
                process.send_signal(number)
                break
        with contextlib.suppress(ValueError):
            process.communicate(timeout=patience())
    assert process.returncode == 75 and result(workdir)["status"] == "preempted"
    assert any((workdir / "checkpoints").iterdir())


def test_damaged_side_files(folder, finished, pretrain):
    """Damaged files that no checkpoint depends on are set aside, with a line each, and the run continues."""
    workdir = folder / "damaged"
    shutil.copytree(finished, workdir)
    for step in (workdir / "checkpoints").iterdir():
        if step.name == "4":
            shutil.rmtree(step)
    (workdir / "metrics.jsonl").write_bytes(b"\xff\xfe\n5\n" + (workdir / "metrics.jsonl").read_bytes() + b'{"step": 3')
    (workdir / "result.json").write_bytes(b"\xff\x00")
    (workdir / "config.json").write_bytes(b"\xe9")
    done = run_job_command(*pretrain(workdir))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert result(workdir)["status"] == "done" and (workdir / "checkpoints" / "4").exists()
    assert done.stderr.count("damaged") >= 3, done.stderr
