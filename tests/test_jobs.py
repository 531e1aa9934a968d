"""Jobs as users run them: from the command line, on real digits, stopped, resumed, and on other devices."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import ROOT, run_all, run_job_command
from orbax.checkpoint import v1 as ocp
from PIL import Image

from igpt_jax import config
from igpt_jax.evaluation import exact_loss
from igpt_jax.runtime.exits import Diverged
from igpt_jax.runtime.job import run_job
from igpt_jax.runtime.precision import PINNED, set_precision
from igpt_jax.training import loop, steps
from igpt_jax.training.optimizer import learning_rate

STEPS = 12
TINY = ["--config.model.name=igpt_tiny", "--config.model.layers=2", "--config.model.embed=16", "--config.model.heads=2",
        f"--config.steps={STEPS}", "--config.batch_size=16", "--config.precision=float32",
        "--config.optimizer.warmup_steps=2", "--config.log_every_steps=1", "--config.eval_every_steps=6",
        "--config.checkpoint_every_steps=5", "--config.keep_steps=(5,)"]
KEPT = (5, 10, 12)  # the named step and the newest two, of which the last is the best


def pretrain_arguments(store, workdir, *more):
    return ["pretrain", f"--workdir={workdir}", f"--config.data.store={store}", *TINY, *more]


def stopped_at_step_4(command):
    """Sends SIGTERM to a run once it has logged step 4. Returns its exit code and the rest of its stderr."""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 4/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    return process.returncode, rest


@pytest.fixture(scope="module")
def trained(folder, store):
    """The undisturbed run, through tf.data."""
    done = run_job_command(*pretrain_arguments(store, folder / "straight", "--config.data.reader=tfdata"))
    assert done.returncode == 0, done.stderr
    return folder / "straight"


def result(workdir):
    return json.loads((pathlib.Path(workdir) / "result.json").read_text())


def arrays(workdir, step=STEPS):
    with warnings.catch_warnings(action="ignore"):  # Orbax warns that no shardings are given
        trees = ocp.load_checkpointables(pathlib.Path(workdir) / "checkpoints" / str(step))
    return {jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path([trees["params"], trees["training"]])}


def losses(workdir):
    """{(step, metric): value} of metrics.jsonl without times and speeds; fails if a step is logged twice."""
    out = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if name.startswith(("train/", "eval/")):
                assert (values["step"], name) not in out
                out[values["step"], name] = value
    return out


def test_a_stopped_run_resumes_bit_for_bit(folder, store, trained):
    """After SIGTERM the same command gives the parameters, moments and losses of an undisturbed run.

    Through tf.data. Seen to fail with the data order starting at 0 after the restart.
    """
    workdir = folder / "stopped"
    command = pretrain_arguments(store, workdir, "--config.data.reader=tfdata")
    code, rest = stopped_at_step_4([sys.executable, "-m", "igpt_jax", *command])
    assert code == 75, rest
    assert "The same command resumes from there" in rest.splitlines()[-1]
    stopped_at = int(re.search(r"stopped after step (\d+) of", rest)[1])
    assert 4 <= stopped_at < STEPS
    assert result(workdir)["status"] == "preempted"
    again = run_job_command(*command)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step {stopped_at}" in again.stderr

    one, other = arrays(trained), arrays(workdir)
    assert one.keys() == other.keys() and len(one) > 30
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    assert losses(trained) == losses(workdir)
    figures = result(trained)["metrics"], result(workdir)["metrics"]
    assert figures[0]["eval/nats_per_pixel"] == figures[1]["eval/nats_per_pixel"]


def test_a_finished_run_started_again_changes_nothing(store, trained):
    """Seen to fail without the evaluation of a finished run: result.json lost its held-out loss."""
    before, figures = arrays(trained), result(trained)["metrics"]
    done = run_job_command(*pretrain_arguments(store, trained, "--config.data.reader=tfdata"))
    assert done.returncode == 0, done.stderr
    after = arrays(trained)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    for name in ("train/nats_per_pixel", "eval/nats_per_pixel", "parameters", "steps"):
        assert result(trained)["metrics"][name] == figures[name]


def test_resident_data_on_eight_devices_without_tensorflow(folder, store, trained):
    """A run of one device, stopped after step 5, resumes on data x fsdp x tensor = 2 x 2 x 2 without TensorFlow.

    fp32 losses stay within 1e-4 of the undisturbed run's. Seen to fail with the resident order shifted by one step.
    """
    workdir = folder / "moved"
    subprocess.run(["cp", "-r", trained, workdir], check=True)
    for step in KEPT[1:]:
        subprocess.run(["rm", "-r", workdir / "checkpoints" / str(step)], check=True)
    arguments = pretrain_arguments(store, workdir, "--config.data.reader=resident", "--config.mesh.data=2",
                                   "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    done = run_job_command(*arguments, script="without_tensorflow.py", devices=8)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 5" in done.stderr and "'tensor': 2" in done.stderr
    one, other = losses(trained), losses(workdir)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-4, atol=1e-7)


def test_evaluate_is_exact_at_any_batch_and_mesh(folder, store, trained):
    """180 held-out digits in batches of 7, 64 and 256, on 1 and 8 devices, many checkpoints at once.

    Seen to fail with the padding of the last batch counted.
    """
    expected = result(trained)["metrics"]["eval/nats_per_pixel"]
    (trained / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()  # as in a run that is saving
    for devices, batch_size in ((1, 7), (1, 256), (8, 64)):
        workdir = folder / f"evaluate{devices}-{batch_size}"
        done = run_job_command("evaluate", f"--workdir={workdir}", f"--config.checkpoints={trained}/checkpoints/*",
                               f"--config.batch_size={batch_size}", devices=devices)
        assert done.returncode == 0, done.stderr
        nats = result(workdir)["metrics"]["nats_per_pixel"]
        assert list(nats) == [f"{trained}/checkpoints/{step}" for step in KEPT]
        assert nats[f"{trained}/checkpoints/12"] == pytest.approx(expected, rel=1e-6)
        rows = json.loads((workdir / "evaluation.json").read_text())
        assert [row["examples"] for row in rows] == [180] * len(KEPT)


def test_sample_is_the_same_at_any_batch_and_mesh(folder, store, trained):
    """Tokens are equal for batches of 3 and 64 and on 8 devices (2 x 2 x 2). Given rows stay as they are.

    Seen to fail with the keys folded by the index within the batch.
    """
    samples = {}
    for devices, more in ((1, ["--config.batch_size=3"]), (1, []),
                          (8, ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"])):
        workdir = folder / f"sample{devices}-{len(more)}"
        done = run_job_command("sample", f"--workdir={workdir}", f"--config.checkpoint={trained}",
                               f"--config.data.store={store}", "--config.count=5", "--config.examples=2",
                               "--config.completions=3", "--config.rows=3", *more, devices=devices)
        assert done.returncode == 0, done.stderr
        with np.load(workdir / "samples.npz") as file:
            samples[workdir] = dict(file)
    first, *others = samples.values()
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name], other[name])
    assert first["samples"].shape == (5, 64) and first["completions"].shape == (2, 3, 64)
    np.testing.assert_array_equal(first["completions"][:, :, :24],
                                  np.broadcast_to(first["originals"][:, None, :24], (2, 3, 24)))
    assert (first["completions"][:, :, 24:] != first["originals"][:, None, 24:]).any()
    with Image.open(workdir / "figures" / "completions.png") as image:
        # Original, given rows and 3 completions, below a line of headings.
        assert image.width == 5 * 96 + 4 * 6 and image.height > 2 * 96 + 6


BAD = {
    "no store": (["pretrain"], "no pixel store is given"),
    "missing store": (["pretrain", "--config.data.store={folder}/nowhere"], "nowhere does not exist"),
    "another image size": (["pretrain", "--config.data.store={store}", "--config.image_size=32"], "image_size=32"),
    "unknown split": (["pretrain", "--config.data.store={store}", "--config.data.split=trian"], "Did you mean 'train'"),
    "mesh": (["pretrain", "--config.data.store={store}", "--config.mesh.data=3"], "does not multiply to the 1 devices"),
    "no checkpoint": (["sample", "--config.checkpoint={store}"], "holds no checkpoint"),
    "nothing to evaluate": (["evaluate"], "checkpoints is empty"),
    "empty glob": (["evaluate", "--config.checkpoints={folder}/x*"], "matches nothing"),
    "too many rows": (["sample", "--config.checkpoint={trained}", "--config.rows=9"], "rows=9"),
    "other settings": (pretrain_arguments("{store}", "{trained}", "--config.seed=4"), "seed=4 (checkpoint: 0)"),
    "other model": (pretrain_arguments("{store}", "{trained}", "--config.model.layers=3"), "model.layers=3"),
    "other job's workdir": (["sample", "--workdir={trained}", "--config.checkpoint={trained}"], "belongs to the job"),
    "foreign workdir": (["prepare", "--workdir={foreign}"], "its config.json is not a job's"),
    "trained on what it measures": (["pretrain", "--config.data.store={store}", "--config.data.split=train+held_out"],
                                    "is also trained on"),
    "warm-up": (pretrain_arguments("{store}", "{folder}/w", "--config.optimizer.warmup_steps=99"), "warmup_steps=99"),
}


@pytest.fixture(scope="module")
def refused(folder, store, trained):
    """{case: (exit code, standard error)}."""
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model": "mine"}')
    paths = {"folder": folder, "store": store, "trained": trained, "foreign": foreign}
    commands = []
    for arguments, _ in BAD.values():
        workdir = [] if any(each.startswith("--workdir") for each in arguments) else ["--workdir={folder}/bad"]
        commands.append([argument.format(**paths) for argument in [*arguments, *workdir]])
    return dict(zip(BAD, run_all(*commands), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, refused, trained):
    """Seen to fail with a ValueError in place of one UserError."""
    code, log = refused[case]
    assert code == 2, log
    assert len(log.splitlines()) == 1 and BAD[case][1] in log, log
    assert result(trained)["status"] == "done"  # a refused command changes nothing in a finished workdir


def run_here(folder, job="report"):
    """Runs a job that does nothing, in this process. Returns its exit code."""
    return run_job(lambda config, workdir: {}, config.parse(job, config.base_config(job)), str(folder))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"job": "rep', None])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_config_or_result_is_set_aside(tmp_path, name, content, caplog):
    """Each time under another name. The other file still says which job the workdir belongs to.

    Seen to fail with a UnicodeDecodeError, and with the job read from config.json alone.
    """
    for left in ([], [f"{name}.damaged"], [f"{name}.damaged", f"{name}.damaged-2"]):
        assert run_here(tmp_path) == 0
        assert sorted(file.name for file in tmp_path.glob("*.damaged*")) == left
        if content is None:
            (tmp_path / name).unlink()
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
    assert run_here(tmp_path, "verify") == 2
    assert content is None or (tmp_path / f"{name}.damaged").read_bytes() == content
    assert len([message for message in caplog.messages if f"{name} is damaged" in message]) == 3


def test_a_foreign_result_is_not_replaced(tmp_path, capsys):
    """Seen to fail with the job read from config.json alone: a foreign result.json was removed."""
    (tmp_path / "result.json").write_text('{"score": 1}')
    assert run_here(tmp_path) == 2
    assert (tmp_path / "result.json").read_text() == '{"score": 1}' and "not a job's" in capsys.readouterr().err


def train_with_bad_rates(monkeypatch, store, workdir, bad_steps, **more):
    """Trains 24 steps in this process. The updates that lead to `bad_steps` have an infinite learning rate."""
    rate = learning_rate
    monkeypatch.setattr(steps, "learning_rate", lambda config, step, *rest: jax.numpy.where(
        jax.numpy.isin(step + 1, np.asarray(bad_steps)), np.inf, rate(config, step, *rest)))
    given = config.base_config("pretrain", "model=igpt_tiny,steps=24,batch_size=8,precision=float32")
    given.model.update(layers=1, embed=8, heads=1)
    given.update({"checkpoint_every_steps": 4, "keep_newest": 1, "max_skipped_updates": 6, **more})
    given.data.store, given.optimizer.warmup_steps = str(store), 2
    loop.train(config.parse("pretrain", given), str(workdir))


def saved(workdir):
    return sorted(int(step.name) for step in (workdir / "checkpoints").iterdir())


def test_saves_and_evaluations_wait_until_an_update_is_accepted(monkeypatch, store, tmp_path):
    """Updates 7 to 10 are skipped: the save and the evaluation due at step 8 happen after step 11. Those of a named
    step, 15, do not wait.

    Seen to fail with step 8 saved, and evaluated without being saved.
    """
    drawn, draw = [], loop.charts.training
    monkeypatch.setattr(loop.charts, "training", lambda lines, *rest: drawn.append(lines[-1]["step"])
                        or draw(lines, *rest))
    train_with_bad_rates(monkeypatch, store, tmp_path, [7, 8, 9, 10, 15], eval_every_steps=8, keep_newest=9,
                         keep_steps=(15,))
    assert drawn == [11, 16, 24, 24]  # the loss curve, at each evaluation and at the end
    assert saved(tmp_path) == [4, 11, 12, 15, 16, 20, 24]
    evaluated = [step for step, name in losses(tmp_path) if name == "eval/nats_per_pixel"]
    assert evaluated == [11, 16, 24]
    assert all(np.isfinite(leaf).all() for leaf in arrays(tmp_path, 15).values())


@pytest.mark.parametrize("bad_from, every, kept, said", [
    (1, 0, [], "No checkpoint was saved before"), (10, 0, [4, 8], "The newest checkpoint, step 8, is good"),
    (9, 0, [4, 8], "Since the newest checkpoint, step 8, no loss .* remove checkpoints/8: step 4 is good"),
    (9, 8, [4, 8], "The newest checkpoint, step 8, is good"),
    (5, 0, [4], "Since the newest checkpoint, step 4, no loss .* start in a new --workdir"),
])
def test_a_run_that_diverges_keeps_its_good_steps(monkeypatch, store, tmp_path, bad_from, every, kept, said):
    """Seen to fail with steps of skipped updates saved, which superseded the good ones."""
    with pytest.raises(Diverged, match=said):
        train_with_bad_rates(monkeypatch, store, tmp_path, range(bad_from, 99), eval_every_steps=every, keep_newest=2)
    assert saved(tmp_path) == kept


def test_a_non_finite_evaluation_is_never_the_best(monkeypatch, store, tmp_path):
    """It removes no other step. Seen to fail with NaN as a score, which no other score exceeds."""
    make_measure = exact_loss.make_measure
    monkeypatch.setattr(exact_loss, "make_measure", lambda *given: lambda params, *rest: {
        name: value * np.nan for name, value in make_measure(*given)(params, *rest).items()})
    train_with_bad_rates(monkeypatch, store, tmp_path, [], eval_every_steps=12)
    assert saved(tmp_path) == [20, 24]


def test_a_run_past_its_end_reports_that_it_is_finished(monkeypatch, store, tmp_path, capsys):
    """Seen to fail with "resuming from step 4 of 2"."""
    more = {"optimizer": {"schedule": "constant"}, "eval_every_steps": 0}
    given = config.base_config("pretrain", "model=igpt_tiny,steps=4,batch_size=8,precision=float32")
    given.model.update(layers=1, embed=8, heads=1)
    given.update(more)
    given.data.store, given.optimizer.warmup_steps = str(store), 2
    for steps_wanted in (4, 2):
        given.steps = steps_wanted
        loop.train(config.parse("pretrain", given), str(tmp_path))
    log = capsys.readouterr().err
    assert "already finished: the newest checkpoint is of step 4; steps=2" in log and "resuming" not in log


@pytest.mark.parametrize("name, value", [
    ("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False), ("jax_random_seed_offset", 7),
    ("jax_high_dynamic_range_gumbel", True), ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
])
def test_no_setting_of_jax_changes_results(name, value, capsys):
    """Environment variables can set each of these. Seen to fail with the name missing in `precision.PINNED`."""
    jax.config.update(name, value)
    set_precision("float32")
    assert getattr(jax.config, name) == PINNED[name] != value
    assert f"{name.upper()} has no effect" in capsys.readouterr().err


def test_the_run_must_divide_over_the_mesh(folder, store):
    """On 8 devices, with images of 8x8. Each error names the value and the nearest valid choice."""
    cases = ((["--config.batch_size=12"], "such as 16"),
             (["--config.accumulate=4"], "8 devices x accumulate=4. Choose a multiple of 32"),
             (["--config.mesh.fsdp=2", "--config.mesh.tensor=4"], "Choose mesh.tensor=2"),
             (["--config.mesh.fsdp=3"], "does not multiply to the 8 devices"),
             (["--config.model.attention=cudnn"], "does not run on cpu. Choose one of: auto, reference"),
             (["--config.mesh.context=3", "--config.mesh.fsdp=2"], "does not multiply to the 8 devices"))
    done = run_all(*(pretrain_arguments(str(store), str(folder / "bad"), *more) for more, _ in cases), devices=8)
    for (_, message), (code, log) in zip(cases, done, strict=True):
        assert code == 2 and message in log and len(log.splitlines()) == 1, log


def test_a_workdir_in_use_is_refused(folder, store):
    """Seen to fail with no lock taken."""
    workdir = folder / "used"
    command = [sys.executable, "-m", "igpt_jax", *pretrain_arguments(store, workdir, "--config.steps=100000")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        second = run_job_command(*pretrain_arguments(store, workdir, "--config.steps=100000"))
        os.kill(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert second.returncode == 2 and str(process.pid) in second.stderr, second.stderr
    assert process.returncode == 75 and "The same command resumes" in rest, rest
