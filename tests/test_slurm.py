"""The SLURM files of launch/ on a real cluster of two nodes on this machine. Run by `make slurm`."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import ROOT, patience, run_job_command
from test_jobs import losses, result

pytestmark = pytest.mark.slurm
STEPS = 40
TINY = ["--config.model.name=igpt_tiny", "--config.model.layers=2", "--config.model.embed=16", "--config.model.heads=2",
        f"--config.steps={STEPS}", "--config.batch_size=16", "--config.precision=float32",
        "--config.optimizer.warmup_steps=2", "--config.log_every_steps=1", "--config.eval_every_steps=20",
        "--config.checkpoint_every_steps=10", "--config.keep_steps=(10,20)"]
TWO = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0"


class Cluster:
    """A cluster of two nodes, n1 and n2. Jobs run in `folder` and write their logs there."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "XLA_FLAGS": "",
                            "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
                            "IGPT_HEARTBEAT_SECONDS": "10"}

    def __call__(self, *command, **environment) -> str:
        done = subprocess.run([*map(str, command)], cwd=self.folder, env={**self.environment, **environment}, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def nodes(self, verb: str, *names: str) -> None:
        subprocess.run([ROOT / "tests/slurm/cluster.sh", verb, *names, self.folder / "slurm"], check=True)

    def submit(self, *arguments, **environment) -> str:
        """Submits launch/slurm/job.sbatch on both nodes. Returns the job's id."""
        return self("sbatch", "--parsable", *TWO.split(), ROOT / "launch/slurm/job.sbatch", *arguments, **environment)

    def job(self, number: str) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self("scontrol", "show", "job", number).split() if "=" in pair)

    def wait(self, number: str, state: str = "COMPLETED", seconds: float = patience()) -> dict[str, str]:
        """Waits until the job (or the array's last task) has ended in `state`. Returns its description."""
        end = time.monotonic() + seconds
        while self("squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T").split() != [state]:
            assert time.monotonic() < end, self("squeue", "--states=all") + self.logs(number)
            time.sleep(0.5)
        return self.job(number)

    def logs(self, number: str) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob(f"*-{number}*.log")))

    def wait_for(self, number: str, text: str, seconds: float = patience()) -> None:
        end = time.monotonic() + seconds
        while text not in self.logs(number):
            assert time.monotonic() < end, f"{text!r} does not appear in\n{self.logs(number)}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    cluster.nodes("up")
    yield cluster
    cluster.nodes("down")


@pytest.fixture(scope="module")
def store(cluster):
    done = run_job_command("prepare", f"--workdir={cluster.folder / 'store'}", "--config.source=digits:train",
                           "--config.test_source=digits:test")
    assert done.returncode == 0, done.stderr
    return cluster.folder / "store"


@pytest.fixture(scope="module")
def arguments(cluster, store):
    return lambda name: ["pretrain", f"--workdir={cluster.folder / name}", f"--config.data.store={store}", *TINY]


@pytest.fixture(scope="module")
def undisturbed(cluster, arguments):
    """An undisturbed run on two processes."""
    number = cluster.submit(*arguments("undisturbed"))
    cluster.wait(number)
    assert result(cluster.folder / "undisturbed")["device"]["processes"] == 2
    log = cluster.logs(number)
    assert "2 processes on n1, n2 (started by SLURM)" in log and "start 1 on n[1-2]" in log
    return cluster.folder / "undisturbed"


def test_a_stopped_run_is_requeued(cluster, arguments, undisturbed):
    """SIGTERM, as at the end of the job's time: exit code 75, requeued, finished, with all losses of the undisturbed
    run."""
    number = cluster.submit(*arguments("stopped"))
    cluster.wait_for(number, f"step 12/{STEPS}")
    cluster("scancel", "--signal=TERM", number)
    cluster.wait_for(number, "exit code 75")
    ended = cluster.wait(number)
    assert ended["Restarts"] == "1" and "resuming from step" in cluster.logs(number)
    assert losses(cluster.folder / "stopped") == losses(undisturbed)


def test_a_run_whose_node_dies_resumes(cluster, arguments, undisturbed):
    """The daemon and the process on n2 are killed: SLURM or the job requeues it. Once the node is back, it
    finishes with all losses of the undisturbed run."""
    number = cluster.submit(*arguments("killed"))
    cluster.wait_for(number, f"step 12/{STEPS}")
    cluster.nodes("down-node", "n2")
    end = time.monotonic() + patience()
    while cluster.job(number)["Restarts"] == "0":
        assert time.monotonic() < end, cluster.logs(number)
        time.sleep(0.5)
    cluster.nodes("up-node", "n2")
    cluster.wait(number)
    assert losses(cluster.folder / "killed") == losses(undisturbed)


def test_a_preempted_run_resumes(cluster, arguments, undisturbed):
    """A job in a partition of higher priority preempts the run: it saves, waits, and finishes with the same losses."""
    number = cluster.submit(*arguments("preempted"))
    cluster.wait_for(number, f"step 12/{STEPS}")
    urgent = cluster("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=srun sleep 1")
    cluster.wait(urgent)
    ended = cluster.wait(number)
    assert int(ended["Restarts"]) >= 1 and "resuming from step" in cluster.logs(number)
    assert losses(cluster.folder / "preempted") == losses(undisturbed)


def test_bad_input_is_not_requeued(cluster, arguments):
    """Exit code 2 ends the job, since the same command would fail again."""
    number = cluster.submit(*arguments("refused"), "--config.batch_size=7")
    ended = cluster.wait(number, "FAILED")
    assert ended["Restarts"] == "0" and ended["ExitCode"] == "2:0", cluster.logs(number)


def test_a_bug_in_one_process_is_not_requeued(cluster, arguments, tmp_path):
    """Process 1 ends with exit code 1, and process 0 then with 134, since it waits for a dead peer. The job's exit code
    is 134, but it is not requeued."""
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" = 1 ] && exit 1\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    number = cluster.submit(*arguments("broken"), PYTHON=str(broken), IGPT_START_SECONDS="15")
    ended = cluster.wait(number, "FAILED")
    assert ended["Restarts"] == "0" and ended["ExitCode"] == "134:0", cluster.logs(number)
    assert "missing: process 1 (n2)." in cluster.logs(number)


def test_the_chain_runs_to_its_last_job(cluster, store):
    """Every stage runs, each after the stage before."""
    run = cluster.folder / "chain"
    options = f"sbatch {TWO}"
    pretrain = [f"--config.data.store={store}", *TINY[:4], "--config.steps=4", *TINY[5:8]]
    shown = cluster(ROOT / "launch/slurm/chain.sh", run, *pretrain, SBATCH=options,
                    FINETUNE="--config.steps=4 --config.batch_size=16")
    numbers = [line for line in shown.splitlines() if line.isdigit()]
    stages = [file.split("--workdir=")[1].split()[0] for file in shown.splitlines() if file.startswith("+")]
    assert len(numbers) == len(stages) >= 3
    for number, stage in zip(numbers, stages, strict=True):
        cluster.wait(number)
        assert result(stage)["status"] == "done"


def test_slices_are_joined(cluster, store):
    """prepare as an array of three and a merge gives a store of as many images as one job."""
    workdir = cluster.folder / "sliced"
    shown = cluster(ROOT / "launch/slurm/slices.sh", 3, "prepare", f"--workdir={workdir}",
                    "--config.source=digits:train", "--config.test_source=digits:test",
                    SBATCH="sbatch --cpus-per-task=1")
    cluster.wait(shown.splitlines()[-1])
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (workdir, store)]
    counts = [sum(split["count"] for split in manifest["splits"].values()) for manifest in manifests]
    assert counts[0] == counts[1] == 1797


def test_each_checkpoint_is_evaluated_once(cluster, undisturbed):
    """evaluate as an array of two and a merge: each checkpoint has a row, in one slice only."""
    workdir, steps = cluster.folder / "curve", {file.name for file in (undisturbed / "checkpoints").iterdir()}
    shown = cluster(ROOT / "launch/slurm/slices.sh", 2, "evaluate", f"--workdir={workdir}",
                    f"--config.checkpoints={undisturbed / 'checkpoints'}/*",
                    SBATCH="sbatch --cpus-per-task=1 --gpus-per-node=0")
    cluster.wait(shown.splitlines()[-1])
    rows = [json.loads((workdir / folder / "evaluation.json").read_text()) for folder in ("slice-0", "slice-1", ".")]
    of_slices = [pathlib.Path(row["checkpoint"]).name for row in (*rows[0], *rows[1])]
    assert sorted(of_slices) == sorted(pathlib.Path(row["checkpoint"]).name for row in rows[2])
    assert set(of_slices) == {step for step in steps if step.isdigit()} and rows[0] and rows[1]


def test_a_scaling_study_in_slices_equals_one_machines(cluster, store):
    """scaling as an array of two and a merge: the table and the fit of a study on one machine."""
    study = [f"--config.pretrain.data.store={store}", "--config.sizes=('1x8','1x16','2x16')",
             "--config.budgets=(5e8,1e9)", "--config.batch_size=32", "--config.fewest_steps=1"]
    workdir, alone = cluster.folder / "study", cluster.folder / "alone"
    shown = cluster(ROOT / "launch/slurm/slices.sh", 2, "scaling", f"--workdir={workdir}", *study,
                    SBATCH="sbatch --cpus-per-task=1 --gpus-per-node=0")
    cluster.wait(shown.splitlines()[-1])
    done = run_job_command("scaling", f"--workdir={alone}", *study)
    assert done.returncode == 0, done.stderr
    tables = [json.loads((folder / "scaling.json").read_text()) for folder in (workdir, alone)]
    assert tables[0] == tables[1] and len(tables[0]) == 6
    assert result(workdir)["metrics"]["laws"] == result(alone)["metrics"]["laws"]


def test_a_sweep_picks_its_best_rate(cluster, store):
    """Two rates as an array, one of them useless; the table names the other."""
    run = cluster.folder / "sweep"
    shown = cluster(ROOT / "launch/slurm/sweep.sh", run, f"--config.data.store={store}", *TINY[:4], "--config.steps=10",
                    *TINY[5:8], RATES="0.003 0.0000001", SBATCH=f"sbatch {TWO} --nodes=1")
    cluster.wait(shown.splitlines()[-1])
    sweep = json.loads((run / "sweep.json").read_text())
    assert [row["learning_rate"] for row in sweep["rows"]] == [0.003, 1e-7]
    assert sweep["verdict"].startswith("Best: learning rate 0.003, ")
