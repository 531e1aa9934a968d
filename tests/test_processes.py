"""Several processes of one job, as launch/local.sh starts them, compute what one process does."""

import os
import signal
import subprocess
import sys

import numpy as np
from conftest import ROOT, run_job_command
from test_jobs import losses, pretrain_arguments, result


def local(processes, arguments, devices, **options):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": flags}
    return subprocess.Popen(["launch/local.sh", str(processes), *arguments], cwd=ROOT, env=environment, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, **options)


def test_two_processes_equal_one_and_stop_together(tmp_path):
    """float64, 2 processes x 4 devices over gloo, fsdp x tensor x context, against 1 device: losses to 1e-8,
    each process reading its own rows by tf.data. Stopped by one SIGTERM both save the same step; one process
    and two evaluate what they wrote, as followers of a run that is done.

    Must fail with every process reading the first rows.
    """
    store = tmp_path / "store"
    assert run_job_command("prepare", f"--workdir={store}").returncode == 0
    more = ["--config.precision=float64", "--config.data.reader=tfdata"]
    one = run_job_command(*pretrain_arguments(store, tmp_path / "one", *more))
    assert one.returncode == 0, one.stderr

    with local(2, ["prepare", f"--workdir={tmp_path / 'other'}"], devices=1) as job:
        assert "prepare runs as one process" in job.stderr.read()
    assert job.returncode == 2

    arguments = pretrain_arguments(store, tmp_path / "two", *more, "--config.mesh.fsdp=2",
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
    assert "goes on from step" in log and result(tmp_path / "two")["device"]["processes"] == 2

    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-8, atol=1e-12)

    for processes in (1, 2):
        workdir = tmp_path / f"evaluate{processes}"
        with local(processes, ["evaluate", f"--workdir={workdir}", f"--config.checkpoints={tmp_path / 'two'}",
                               "--config.watch=True", "--config.precision=float64"], devices=4) as job:
            log = job.stderr.read()
        assert job.returncode == 0, log
        nats = result(workdir)["metrics"]["nats_per_pixel"][f"{tmp_path / 'two'}/checkpoints/12"]
        np.testing.assert_allclose(nats, expected[12, "eval/nats_per_pixel"], rtol=1e-8)

    samples = {}
    for processes in (1, 2):
        workdir = tmp_path / f"sample{processes}"
        with local(processes, ["sample", f"--workdir={workdir}", f"--config.checkpoint={tmp_path / 'one'}",
                               "--config.count=6", "--config.examples=0"], devices=2) as job:
            log = job.stderr.read()
        assert job.returncode == 0, log
        with np.load(workdir / "samples.npz") as file:
            samples[processes] = file["samples"]
    np.testing.assert_array_equal(samples[1], samples[2])
