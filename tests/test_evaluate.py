"""The evaluate job: a run that is followed, slices of an array job, damaged checkpoints, loss maps."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from conftest import ROOT, patience, run_all, run_job_command
from PIL import Image

from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import watching
from igpt_jax.config import MeshConfig, UserError, parse
from igpt_jax.data.store import Store, Writer
from igpt_jax.evaluation import exact_loss
from igpt_jax.jobs import evaluate as job
from igpt_jax.parallel import sharding
from igpt_jax.storage import slices

STEPS = (4, 8, 12, 16, 20)
SHAPE = ("--config.model.name=igpt_tiny", "--config.model.layers=2", "--config.model.embed=16",
         "--config.model.heads=2", "--config.batch_size=16", "--config.precision=float32",
         "--config.optimizer.warmup_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    done = run_job_command("prepare", f"--workdir={folder / 'store'}", "--config.source=digits:train",
                           "--config.test_source=digits:test")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def logs(folder):
    """Logs of a follower that starts before its run, is killed at its first row, and starts again."""
    command = [sys.executable, "-m", "igpt_jax", "evaluate", f"--workdir={folder / 'watch'}",
               f"--config.checkpoints={folder / 'run'}", "--config.watch=True", "--config.poll_seconds=0.2",
               f"--config.idle_seconds={patience()}"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    train = subprocess.Popen([sys.executable, "-m", "igpt_jax", "pretrain", f"--workdir={folder / 'run'}",
                              f"--config.data.store={folder / 'store'}", *SHAPE, f"--config.steps={STEPS[-1]}",
                              "--config.checkpoint_every_steps=4",
                              "--config.eval_every_steps=0", "--config.keep_newest=9"],
                             cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with first, train:
        line = first.stderr.readline()
        first.send_signal(signal.SIGKILL)
        logs = [line + first.stderr.read()]
        second = run_job_command(*command[3:])
        logs.append(second.stderr)
        log = train.stderr.read()
    assert train.returncode == 0, log
    assert second.returncode == 0, second.stderr
    return logs


def rows_of(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


def evaluate(folder, name, *more, code=0):
    done = run_job_command("evaluate", f"--workdir={folder / name}", *more)
    assert done.returncode == code, done.stderr
    return done


def test_a_followed_run_is_evaluated_once_per_step_though_the_follower_is_killed(folder, logs):
    """SIGKILL after the first row, then the same command: one row and one line per step, a table and a figure.

    Seen to fail with a step logged before its row was written, and with the first process's rows lost.
    """
    log = "".join(logs)
    for step in STEPS:
        assert log.count(f"step {step:,}, ") == 1, log
    assert logs[0].count("nats per pixel") >= 1 and logs[1].count("nats per pixel") >= 1
    rows = rows_of(folder / "watch")
    assert [row["steps"] for row in rows] == list(STEPS)
    with open(folder / "watch" / "evaluation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        assert float(line["nats_per_pixel"]) == row["nats_per_pixel"] < 3
        np.testing.assert_allclose(row["bits_per_pixel"], row["nats_per_pixel"] / np.log(2), rtol=1e-12)
    assert (folder / "watch" / "figures" / "loss.png").stat().st_size > 10_000


def test_slices_join_to_the_table_of_one_job(folder, logs):
    """Two slices and their merge, against the watched table; while one is missing, the merge is refused.

    Seen to fail with the slices chosen by the position in the current list.
    """
    steps, oldest = f"--config.checkpoints={folder / 'run'}/checkpoints/*", folder / "run" / "checkpoints" / "4"
    first, second = sorted((0, 1), key=lambda i: not watching.in_slice(str(oldest), i, 2))
    evaluate(folder, "array/first", steps, f"--config.shard={first}/2")
    done = evaluate(folder, "array", "--config.shard=merge", code=2)
    assert f"slices {second}/2 are not done" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    shutil.move(oldest, folder / "removed")  # by the run, after the slice that it belongs to has measured it
    try:
        evaluate(folder, "array/second", steps, f"--config.shard={second}/2")
    finally:
        shutil.move(folder / "removed", oldest)
    evaluate(folder, "array", "--config.shard=merge")
    joined, whole = rows_of(folder / "array"), rows_of(folder / "watch")
    assert [row["checkpoint"] for row in joined] == [row["checkpoint"] for row in whole]
    assert [row["nats_per_pixel"] for row in joined] == [row["nats_per_pixel"] for row in whole]


def test_a_merge_takes_each_slice_once(tmp_path):
    """A finished job beside the slices is none of them; two folders of one slice are refused.

    Seen to fail with rows of the whole job twice, and with those of one of the two folders lost.
    """
    def finished(name, shard):
        for file, content in (("config", {"job": "evaluate", "shard": shard}), ("result", {"status": "done"}),
                              ("evaluation", [{"from": name}])):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))

    for name, shard in (("a", "0/2"), ("b", "1/2"), ("whole", "")):
        finished(name, shard)
    assert [row["from"] for row in slices.joined(tmp_path, "evaluate", "evaluation")[1]] == ["a", "b"]
    finished("c", "0/2")
    with pytest.raises(UserError, match="two folders are both slice 0/2"):
        slices.joined(tmp_path, "evaluate", "evaluation")


def test_damaged_steps_are_reported_and_the_others_measured(folder, logs):
    """A flipped bit in one of two checkpoints, and a third that is still being written: exit code 2, one row.

    Seen to fail with the job ended at the first damage.
    """
    steps = folder / "damaged" / "checkpoints"
    for step in ("4", "8"):
        shutil.copytree(folder / "run" / "checkpoints" / step, steps / step)
    (steps / "12").mkdir()
    files = [file for file in (steps / "4" / "params").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    done = evaluate(folder, "evaluate_damaged", f"--config.checkpoints={steps}/*", code=2)
    assert "not in the table: " in done.stderr and "is damaged" in done.stderr, done.stderr
    assert [row["steps"] for row in rows_of(folder / "evaluate_damaged")] == [8]
    result = json.loads((folder / "evaluate_damaged" / "result.json").read_text())
    assert result["status"] == "failed" and len(result["metrics"]["nats_per_pixel"]) == 1


def test_a_step_removed_during_its_measurement_has_a_row(folder, logs, monkeypatch):
    """A run that is still training removes old steps. Seen to fail with the identity read after the measurement."""
    steps = folder / "vanishing" / "checkpoints"
    shutil.copytree(folder / "run" / "checkpoints" / "4", steps / "4")
    over_split = exact_loss.over_split

    def remove_first(*arguments):
        shutil.rmtree(steps / "4", ignore_errors=True)
        return over_split(*arguments)

    monkeypatch.setattr(exact_loss, "over_split", remove_first)
    job.run(parse("evaluate", {"checkpoints": f"{steps}/4"}), str(folder / "evaluate_vanishing"))
    assert [row["steps"] for row in rows_of(folder / "evaluate_vanishing")] == [4]


def measure(folder, name, **given):
    """The rows of an evaluation in this process, and the number of checkpoints that it measured."""
    measured = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_measured", lambda *arguments, inner=job._measured: measured.append(1) or inner(*arguments))
        job.run(parse("evaluate", {"checkpoints": f"{folder / 'run'}/checkpoints/*", **given}), str(folder / name))
    return rows_of(folder / name), len(measured)


@pytest.mark.parametrize("what", ["tokens", "store", pytest.param("probed", marks=pytest.mark.slow)])
def test_changed_data_under_the_same_path_is_measured_again(folder, logs, what):
    """Changed tokens, store or probed store: every checkpoint is measured again. Unchanged: none is.

    Seen to fail with rows identified by path, settings and checkpoint alone.
    """
    path, name = folder / f"changing {what}", f"evaluate changing {what}"

    def put(seed):
        random = np.random.default_rng(seed)
        if what == "tokens":
            colors = len(checkpoint.load_metadata(str(folder / "run")).palette_VC)
            return np.save(f"{path}.npy", random.integers(0, colors, (20, 64)))
        shutil.rmtree(path, ignore_errors=True)
        writer = Writer(storage.path(path), 8)
        for split in ("train", "held_out", "test"):
            writer.add(split, random.integers(0, 256, (40, 8, 8, 3), np.uint8), (np.arange(40) % 2).astype(np.int32))
        writer.finish(Store.open(folder / "store").palette, source="", resize="", seed=0, held_out={}, config={})

    given = {"tokens": {"tokens": f"{path}.npy"}, "store": {"data": {"store": str(path)}},
             "probed": {"probe": True, "limit": 30, "probing": {"data": {"store": str(path)}}}}[what]
    put(0)
    first, measured = measure(folder, name, **given)
    assert measured == len(STEPS) and measure(folder, name, **given) == (first, 0)
    put(1)
    second, measured = measure(folder, name, **given)
    assert measured == len(STEPS) and second != first


def test_a_table_of_other_settings_is_kept(folder, logs):
    """Its checkpoints may be gone by now. Seen to fail with the rows dropped."""
    given = {"checkpoints": str(folder / "run")}
    first, _ = measure(folder, "other settings", **given)
    second, measured = measure(folder, "other settings", limit=5, **given)
    assert measured == 1 and [row["examples"] for row in second] == [5]
    kept, = (folder / "other settings").glob("evaluation.json.former")
    assert json.loads(kept.read_text()) == first


def test_figures_of_trained_images_say_so(folder, logs, capsys):
    """On the store of the training, not on another one. Seen to fail without the column."""
    rows, _ = measure(folder, "on train", checkpoints=str(folder / "run"), data={"split": "train+held_out"}, limit=5)
    assert rows[0]["trained_on"] == "train" and "was trained on train" in capsys.readouterr().err
    rows, _ = measure(folder, "on held out", checkpoints=str(folder / "run"), limit=5)
    assert "trained_on" not in rows[0]


@pytest.mark.parametrize("content", [b"", b"\xff", b"5", b"null", b'[5, {"checkpoint": 1}]'])
def test_a_damaged_table_is_set_aside_and_written_anew(folder, logs, content, caplog):
    """Seen to fail without the check of the table's content."""
    (folder / "damaged table").mkdir(exist_ok=True)
    (folder / "damaged table" / "evaluation.json").write_bytes(content)
    rows, measured = measure(folder, "damaged table", checkpoints=str(folder / "run"))
    assert measured == 1 and [row["steps"] for row in rows] == [20]
    if not content.startswith(b"["):
        assert any("evaluation.json is damaged" in message for message in caplog.messages), caplog.messages


@pytest.mark.parametrize("content", [b"", b"\xff", b"5", b'{"metrics": {"eval/nats_per_pixel": 1.0}, "crc32": 1}'])
def test_damaged_figures_do_not_condemn_their_step(folder, logs, content, tmp_path, caplog):
    """An evaluation may write them after the step was saved. `verify` reports them.

    Seen to fail with the step taken for damaged and moved to quarantine.
    """
    step = shutil.copytree(folder / "run" / "checkpoints" / "8", tmp_path / "checkpoints" / "8")
    (step / "evaluation.json").write_bytes(content)
    assert checkpoint.load_metadata(str(tmp_path)).steps_done == 8
    assert ["Its metrics are not used" in message for message in caplog.messages] == [True]
    problem = checkpoint.verify(str(tmp_path / "checkpoints"), 8, sharding.make_mesh(MeshConfig()))["problem"]
    assert "evaluation.json" in problem


def test_a_loss_that_is_not_finite_is_a_row_like_any_other(folder, logs, monkeypatch, capsys):
    """Measured once, with loss maps; then the same command again. Seen to fail with a TypeError over null."""
    over_split = exact_loss.over_split

    def not_finite(*arguments):
        for found in over_split(*arguments):
            yield jax.tree.map(lambda x: x * np.float32(np.nan), found)

    monkeypatch.setattr(exact_loss, "over_split", not_finite)
    given = {"checkpoints": f"{folder / 'run'}/checkpoints/4", "loss_maps": 2, "limit": 20}
    first, measured = measure(folder, "not finite", **given)
    assert measured == 1 and [row["nats_per_pixel"] for row in first] == [None]
    assert measure(folder, "not finite", **given) == (first, 0)
    log = capsys.readouterr().err
    assert "a loss that is not finite over 20 images" in log and "cannot be drawn" not in log, log
    (file,) = (folder / "not finite" / "surprise").iterdir()
    assert json.loads(file.read_text(), parse_constant=pytest.fail)["nats_by_place"][0][0] is None
    monkeypatch.undo()
    rows, measured = measure(folder, "not finite", **given | {"checkpoints": f"{folder / 'run'}/checkpoints/*"})
    assert measured == len(STEPS) - 1 and [row["nats_per_pixel"] is None for row in rows] == [True, *4 * [False]]


def test_another_run_s_step_under_the_same_path_is_evaluated(folder, logs):
    """The same command again does nothing; with another run's step under the same path, it measures that one.

    Seen to fail with rows identified by path alone.
    """
    done = run_job_command("pretrain", f"--workdir={folder / 'other'}", f"--config.data.store={folder / 'store'}",
                           *SHAPE, "--config.steps=4", "--config.seed=1", "--config.eval_every_steps=0")
    assert done.returncode == 0, done.stderr
    step = folder / "swapped" / "checkpoints" / "4"
    given = {"checkpoints": str(step)}
    shutil.copytree(folder / "run" / "checkpoints" / "4", step)
    assert checkpoint.identity(step) == checkpoint.identity(folder / "run" / "checkpoints" / "4")
    first, measured = measure(folder, "evaluate_swapped", **given)
    assert measured == 1 and measure(folder, "evaluate_swapped", **given) == (first, 0)
    shutil.rmtree(step)
    shutil.copytree(folder / "other" / "checkpoints" / "4", step)
    second, measured = measure(folder, "evaluate_swapped", **given)
    assert measured == 1 and len(second) == 1 and second[0]["nats_per_pixel"] != first[0]["nats_per_pixel"]


OPTIMISTIC = ("--config.probe=True", "--config.probing.data.test=held_out")  # has a note, not to stand before an error
BAD = {
    "no checkpoints, while it waits": (["--config.watch=True"], "checkpoints is empty"),
    "empty glob": (["--config.checkpoints={folder}/nothing*", *OPTIMISTIC], "matches nothing"),
    "no such layer": (["--config.checkpoints={folder}/run", *OPTIMISTIC, "--config.probing.layers=(99,)"], "layers="),
    "nothing ever came": (["--config.checkpoints={folder}/nothing", "--config.watch=True", "--config.idle_seconds=0.1",
                           "--config.poll_seconds=0.1"], "names no finished checkpoint"),
    "being written": (["--config.checkpoints={folder}/unfinished/checkpoints/12"], "holds no checkpoint"),
    "no store, while it waits": (["--config.checkpoints={folder}/nothing", "--config.watch=True",
                                 "--config.data.store={folder}/missing"], "missing"),
    "no store to probe": (["--config.checkpoints={folder}/run", *OPTIMISTIC,
                           "--config.probing.data.store={folder}/missing"], "missing"),
    "no slice": (["--config.shard=2/2"], "slices are 0/n to n-1/n"),
    "no such features": (["--config.checkpoints={folder}/run", "--config.completions=1",
                          "--config.completion_features=nowhere:f"], "cannot be imported"),
    "nothing to merge": (["--config.shard=merge"], "finished slices of 0 array jobs"),
}


@pytest.fixture(scope="module")
def refused(folder, logs):
    """{case: (exit code, standard error)}."""
    (folder / "unfinished" / "checkpoints" / "12").mkdir(parents=True)
    commands = [["evaluate", f"--workdir={folder}/bad {case}", *(each.format(folder=folder) for each in more)]
                for case, (more, _) in BAD.items()]
    return dict(zip(BAD, run_all(*commands), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, refused):
    code, log = refused[case]
    assert code == 2 and BAD[case][1] in log and len(log.splitlines()) == 1, log


def test_every_checkpoint_is_in_one_slice():
    """And slices have about the same size. Seen to fail with Python's own hash, which differs between processes."""
    steps = [f"runs/pretrain/checkpoints/{step}" for step in range(0, 1_000_000, 5000)]
    owners = [[i for i in range(4) if watching.in_slice(step, i, 4)] for step in steps]
    assert all(len(owner) == 1 for owner in owners)
    assert owners[1] == [zlib.crc32(steps[1].encode()) % 4]
    assert min(np.bincount([owner for owner, in owners])) > 30


def test_samples_are_those_of_the_sample_job(folder, logs):
    """Of each checkpoint, with its step; once. Seen to fail with another half given, with all steps under one name, and
    with the second index of a sample counted."""
    last = STEPS[-1]
    given = (f"--config.checkpoints={folder / 'run'}/checkpoints/{last},{folder / 'run'}/checkpoints/{STEPS[0]}",
             "--config.samples=3", "--config.data.split=test", "--config.limit=20")
    evaluate(folder, "samples", *given)
    done = run_job_command("sample", f"--workdir={folder / 'sample'}", "--config.data.split=test", "--config.count=3",
                           f"--config.checkpoint={folder / 'run'}/checkpoints/{last}", "--config.examples=3",
                           "--config.completions=1")
    assert done.returncode == 0, done.stderr
    found = {int(arrays["step"]): arrays for arrays in map(np.load, (folder / "samples" / "samples").iterdir())}
    assert sorted(found) == [STEPS[0], last]
    with np.load(folder / "sample" / "samples.npz") as expected:
        for name in ("samples", "originals", "completions", "palette"):
            np.testing.assert_array_equal(found[last][name], expected[name], err_msg=name)
    assert (found[last]["completions"] != found[STEPS[0]]["completions"]).any()
    assert "nats per pixel" not in evaluate(folder, "samples", *given).stderr


def test_loss_maps_are_drawn_and_written(folder, logs):
    """Means over positions and over classes equal the loss in the table; maps have the size of their pictures."""
    evaluate(folder, "loss maps", f"--config.checkpoints={folder / 'run'}", "--config.loss_maps=3",
             "--config.data.split=test", "--config.limit=100")
    (row,) = rows_of(folder / "loss maps")
    (file,) = (folder / "loss maps" / "surprise").iterdir()
    maps = json.loads(file.read_text())
    assert np.mean(maps["nats_by_place"]) == pytest.approx(row["nats_per_pixel"], rel=1e-5)
    classes = maps["nats_by_class"].values()
    assert sum(each["examples"] for each in classes) == maps["examples"] == 100
    assert sum(each["examples"] * each["nats_per_pixel"] for each in classes) / 100 == pytest.approx(
        row["nats_per_pixel"], rel=1e-6)
    assert [np.shape(each["nats"]) for each in maps["pictures"]] == [(8, 8)] * 3
    figures = sorted((folder / "loss maps" / "figures").glob("surprise*.png"))
    assert len(figures) == 2
    for figure in figures:
        with Image.open(figure) as image:
            assert image.width > 400


def test_runs_with_names_alike_keep_their_own_loss_maps(folder, logs):
    """`a b` and `a-b`, measured twice. Seen to fail with the second one's files written over the first one's."""
    steps = [str(folder / run / "checkpoints" / "4") for run in ("a b", "a-b")]
    for step in steps:
        shutil.copytree(folder / "run" / "checkpoints" / "4", step)
    given = {"checkpoints": ",".join(steps), "loss_maps": 1}
    for limit in (5, 6):  # another limit measures both again
        measure(folder, "alike", **given, limit=limit)
        files = (folder / "alike" / "surprise").iterdir()
        assert sorted(json.loads(file.read_text())["checkpoint"] for file in files) == steps
        assert len(list((folder / "alike" / "figures").glob("surprise*.png"))) == 4
