"""Several processes of one job, started by launch/local.sh, compute the same as one process."""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, fake_devices, run_all
from test_jobs import losses, pretrain_arguments, result


def local(processes, arguments, devices, **options):
    environment = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": fake_devices(devices)}
    return subprocess.Popen(["launch/local.sh", str(processes), *arguments], cwd=ROOT, env=environment, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, **options)


def trained(folder, store, name, *more):
    return pretrain_arguments(store, folder / name, "--config.precision=float64", *more)


def on_one(folder):
    """{job: its arguments without --workdir}, for the checkpoint of the run on one process."""
    return {"evaluate": [f"--config.checkpoints={folder / 'one'}", "--config.precision=float64"],
            "probe": [f"--config.checkpoint={folder / 'one'}", "--config.precision=float64",
                      "--config.baselines=False"],
            "sample": [f"--config.checkpoint={folder / 'one'}", "--config.count=6", "--config.examples=2"]}


def figures(workdir):
    """All figures of evaluate and probe, and the images of sample."""
    found = {}
    for job in ("evaluate", "probe"):
        metrics = result(workdir / job)["metrics"]
        found[job] = [value for each in metrics.values()
                      for value in (each.values() if isinstance(each, dict) else [each])]
    with np.load(workdir / "sample" / "samples.npz") as file:
        return found, file["samples"], file["completions"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run on one process with one device, and evaluate, probe and sample of its checkpoint."""
    folder = tmp_path_factory.mktemp("processes")
    store = folder / "store"
    commands = [["prepare", f"--workdir={store}", "--config.source=digits:train", "--config.test_source=digits:test"],
                trained(folder, store, "one")]
    commands += [[job, f"--workdir={folder / '1' / job}", *arguments] for job, arguments in on_one(folder).items()]
    for code, log in run_all(*commands):
        assert code == 0, log
    return folder


def test_two_processes_equal_one_and_stop_together(one):
    """In float64, 2 processes x 4 devices over gloo (fsdp x tensor x context) have the losses of 1 device to 1e-8.

    Each process reads its own rows by tf.data. One SIGTERM stops both at the same step. One process and two processes
    then evaluate the finished run with watch=True.

    Seen to fail with every process reading the first rows.
    """
    with local(2, ["prepare", f"--workdir={one / 'other'}"], devices=1) as job:
        assert "prepare runs as one process" in job.stderr.read()
    assert job.returncode == 2

    arguments = trained(one, one / "store", "two", "--config.data.reader=tfdata", "--config.mesh.fsdp=2",
                        "--config.mesh.tensor=2", "--config.mesh.context=2")
    with local(2, arguments, devices=4) as job:
        for line in job.stderr:
            if line.startswith("[0] step 3/"):
                os.kill(job.pid, signal.SIGTERM)
                break
        rest = job.stderr.read()
    assert job.returncode == 75, rest
    with local(2, arguments, devices=4) as job:
        log = job.stderr.read()
    assert job.returncode == 0, log
    assert "resuming from step" in log and result(one / "two")["device"]["processes"] == 2

    expected, found = losses(one / "one"), losses(one / "two")
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-8, atol=1e-12)

    for processes in (1, 2):
        workdir = one / f"followed{processes}"
        with local(processes, ["evaluate", f"--workdir={workdir}", f"--config.checkpoints={one / 'two'}",
                               "--config.watch=True", "--config.precision=float64"], devices=4) as job:
            log = job.stderr.read()
        assert job.returncode == 0, log
        nats = result(workdir)["metrics"]["nats_per_pixel"][f"{one / 'two'}/checkpoints/12"]
        np.testing.assert_allclose(nats, expected[12, "eval/nats_per_pixel"], rtol=1e-8)


def test_a_study_on_two_processes_stops_in_its_second_run(one):
    """Seen to fail with JAX's preemption service still that of the first run."""
    arguments = ["scaling", f"--workdir={one / 'study'}", f"--config.pretrain.data.store={one / 'store'}",
                 "--config.sizes=('1x8','1x16')", "--config.batch_size=32", "--config.budgets=(2e9,)",
                 "--config.fewest_steps=1", "--config.pretrain.log_every_steps=1", "--config.pretrain.mesh.fsdp=2"]
    with local(2, arguments, devices=1) as job:
        lines = itertools.dropwhile(lambda line: not line.startswith("[0] run 2 of 2"), job.stderr)
        next(line for line in lines if line.startswith("[0] step 3/"))
        os.kill(job.pid, signal.SIGTERM)
        rest = job.stderr.read()
    assert job.returncode == 75, rest
    assert result(one / "study")["status"] == "preempted" and result(one / "study" / "2e9-1x8")["status"] == "done"


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_jobs_on_several_processes_equal_one(one, processes):
    """evaluate and probe agree in float64 to 1e-8, sample in float32 token for token. With four processes the losses of
    pretrain agree to 1e-8 too; the test above covers two.

    Seen to fail with every process evaluating the first rows.
    """
    commands = [[job, f"--workdir={one / str(processes) / job}", *arguments] for job, arguments in on_one(one).items()]
    if processes > 2:
        commands.append(trained(one, one / "store", "several"))
    for command in commands:
        with local(processes, command, devices=1) as job:
            log = job.stderr.read()
        assert job.returncode == 0, log
        assert f"{processes} processes on " in log
    expected, found = figures(one / "1"), figures(one / str(processes))
    for job, values in expected[0].items():
        np.testing.assert_allclose(found[0][job], values, rtol=1e-8)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    if processes > 2:
        expected, found = losses(one / "one"), losses(one / "several")
        assert expected.keys() == found.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-8, atol=1e-12)
