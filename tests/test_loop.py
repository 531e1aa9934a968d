"""The training loop's own faults, in this process: damaged images, replicas that differ, the watchdog."""

import dataclasses
import errno
import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from igpt_jax import checkpoint, config, storage
from igpt_jax.checkpoint import verification
from igpt_jax.data.store import Writer, reader
from igpt_jax.jobs import evaluate, verify
from igpt_jax.parallel import checksums
from igpt_jax.runtime.job import run_job
from igpt_jax.training import loop


def code_of_a_run(store, workdir, steps, **keys):
    """Exit code of a tiny run in this process."""
    given = config.base_config("pretrain", "model=igpt_tiny,batch_size=8,precision=float32,eval_every_steps=0")
    given.model.update(layers=1, embed=8, heads=1)
    given.data.store, given.steps = str(store), steps
    given.optimizer.update(schedule="constant", warmup_steps=1)
    given.update(keys)
    return run_job(loop.train, config.parse("pretrain", given), str(workdir))


def test_a_fault_after_the_start_keeps_the_runs_files(store, tmp_path, monkeypatch):
    """A damaged image ends the run as failed. Seen to fail with the former result.json, which says done."""
    assert code_of_a_run(store, tmp_path, 2) == 0

    def damaged(run):
        raise config.UserError("an image is damaged")

    monkeypatch.setattr(loop.Run, "run_steps", damaged)
    assert code_of_a_run(store, tmp_path, 3) == 2
    given, result = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "result.json"))
    assert (given["steps"], result["status"]) == (3, "failed")


def test_figures_are_of_the_images_that_the_command_names(tmp_path, monkeypatch):
    """A finished run with another split or store is evaluated anew; without a split it reports none. Seen to fail with
    the former figures reported, and with new ones taken for those of the first split."""
    for seed in (0, 1):
        random, writer = np.random.default_rng(seed), Writer(storage.path(tmp_path / f"store{seed}"), 4)
        for split in ("train", "held_out", "test"):
            writer.add(split, random.integers(0, 256, (8, 4, 4, 3), np.uint8), None)
        palette_VC = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
        writer.finish(palette_VC, source="", resize="", seed=0, held_out={}, config={})

    def figures(store, held_out):
        keys = {"eval_every_steps": 1, "accept_changes": ("data",), "data": {"held_out": held_out}}
        assert code_of_a_run(tmp_path / store, tmp_path / "run", 2, **keys) == 0
        metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
        return metrics.get("eval/nats_per_pixel"), metrics["best_step"]

    first = figures("store0", "held_out")
    monkeypatch.setattr(loop.Run, "compile", lambda run: None)  # no step is left
    others = [figures(*given) for given in (("store0", "test"), ("store1", "held_out"), ("store1", ""))]
    assert len({first[0], *(nats for nats, _ in others)}) == 4
    assert [best for _, best in others] == [2, 2, None] and others[-1][0] is None
    assert figures("store0", "held_out")[0] == first[0]


def test_keys_without_effect_on_the_data_or_the_step_are_refused(store, tmp_path, capsys):
    """Seen to fail without each rule."""
    for given, message in (("tfds:nothing", "data.weights=(1, 3) has no effect on tfds:"),
                           (store, "accumulate=2 has no effect with images_per_pass")):
        keys = {"accumulate": 2, "images_per_pass": 4} if given is store else {"data": {"weights": (1, 3)}}
        assert code_of_a_run(given, tmp_path, 2, **keys) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_same_images_in_other_chunks_are_other_data(tmp_path, capsys):
    """Their order differs. A checkpoint that says nothing of chunks resumes. Seen to fail (resumed) without
    data_chunks."""
    for chunk in (1, 4):
        writer = Writer(storage.path(tmp_path / f"{chunk}"), 4, chunk)
        writer.add("train", np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8), None)
        writer.finish(np.eye(3, dtype=np.float32), source="", resize="", seed=0, held_out={}, config={})
    data = {"held_out": ""}
    assert code_of_a_run(tmp_path / "1", tmp_path / "run", 1, data=data) == 0
    capsys.readouterr()
    assert code_of_a_run(tmp_path / "4", tmp_path / "run", 2, data=data) == 2
    assert "data='the same images in chunks of 4' (checkpoint: 'the same images in chunks of 1')" in (
        refusal := capsys.readouterr().err) and refusal.count("\n") == 1
    assert code_of_a_run(tmp_path / "4", tmp_path / "run", 2, data=data, accept_changes=("data",)) == 0
    newest = checkpoint.load_metadata(str(tmp_path / "run"))
    assert newest.data_chunks == "4" and [change["key"] for change in newest.changes] == ["data"]
    dataclasses.replace(newest, data_chunks="").check_resumable(dataclasses.replace(newest, data_chunks="1"), "here")


def test_metrics_that_cannot_be_read_end_no_run(store, tmp_path, monkeypatch, capsys):
    """In a bucket the first flush may fail. Seen to fail with the loss curve drawn from a file that is not there."""
    def missing(workdir):
        raise config.UserError(f"{workdir}/metrics.jsonl does not exist")

    monkeypatch.setattr(loop, "load_metrics", missing)
    monkeypatch.setattr(loop, "metrics_lines", missing)
    assert code_of_a_run(store, tmp_path, 2, eval_every_steps=1) == 0
    assert "no loss curve: " in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [
    (ValueError("UNAVAILABLE: Error opening the driver"), 76), (OSError(errno.ESTALE, "Stale file handle"), 76),
    (ValueError("PERMISSION_DENIED: no access"), 2), (MemoryError(), 2), (ValueError("a bug"), 1)])
def test_storage_out_of_reach_restarts_the_job(tmp_path, error, code, capsys):
    """Schedulers restart after 76. Seen to fail as a stack trace with exit code 1."""
    def fails(*_):
        raise error

    assert run_job(fails, config.parse("verify", config.base_config("verify")), str(tmp_path)) == code
    said = capsys.readouterr().err
    assert ("out of reach" in said or "too many examples" in said) == (code != 1)
    assert code == 1 or len(said.splitlines()) == 1


@pytest.mark.parametrize("where", ["store", "checkpoint", "manifest", "evaluate"])
def test_files_out_of_reach_are_not_damaged(store, tmp_path, monkeypatch, where, capsys):
    """Seen to fail with the advice to prepare the store again, and with the checkpoint called damaged."""
    def fails(*_, **__):
        stale = OSError(errno.ESTALE, "Stale file handle")
        raise stale if where in ("manifest", "evaluate") else ValueError("UNAVAILABLE: no answer")

    if where == "checkpoint":
        assert code_of_a_run(store, tmp_path / "run", 1) == 0
        monkeypatch.setattr(verification.ocp, "checkpointables_metadata", fails)
        given = config.VerifyConfig(path=str(tmp_path / "run"))
        assert run_job(verify.run, given, str(tmp_path / "verify")) == 76
    elif where == "evaluate":
        assert code_of_a_run(store, tmp_path / "run", 1) == 0
        kind = type(epath.Path("/"))
        monkeypatch.setattr(kind, "read_bytes", lambda path, read=kind.read_bytes: (
            fails() if "CHECKPOINT" in path.name else read(path)))
        given = config.EvaluateConfig(checkpoints=str(tmp_path / "run"))
        assert run_job(evaluate.run, given, str(tmp_path / "evaluate")) == 76
    else:
        target = (reader.tensorstore, "open") if where == "store" else (epath.Path("/"), "read_bytes")
        monkeypatch.setattr(target[0] if where == "store" else type(target[0]), target[1], fails)
        assert code_of_a_run(store, tmp_path / "run", 1) == 76
    said = capsys.readouterr().err
    assert "prepare it again" not in said and "damaged" not in said


def test_replicas_that_differ_end_the_run_unsaved(store, tmp_path, monkeypatch, capsys):
    """Seen to fail with the comparison left out, and with a save before it."""
    found = iter([{}, {"params/head_VD": ["cpu:0"]}])
    monkeypatch.setattr(checksums, "odd_devices", lambda *_: next(found))
    keys = {"compare_replicas_every_steps": 2, "checkpoint_every_steps": 2}
    assert code_of_a_run(store, tmp_path, 6, **keys) == 77
    assert "params/head_VD on cpu:0. Nothing is saved" in capsys.readouterr().err
    assert checkpoint.locate(str(tmp_path))[1] == 2
    assert not (tmp_path / "divergence.json").exists()  # skip_divergence must not skip these examples: they are good


def test_the_watchdog_sees_every_step(store, tmp_path, monkeypatch):
    """With the time of `stall_seconds`. Seen to fail where the loop did not beat."""
    seen = []

    class Spy(loop.Watchdog):
        def __init__(self, seconds):
            seen.append(seconds)
            super().__init__(seconds)

        def beat(self, what):
            seen.append(what)
            super().beat(what)

    monkeypatch.setattr(loop, "Watchdog", Spy)
    assert code_of_a_run(store, tmp_path, 3, stall_seconds=77.0) == 0
    assert seen[0] == 77
    assert {"compiling", "doing step 1", "doing step 2", "doing step 3", "evaluating", "saving step 3"} <= set(seen)


def test_precision_follows_the_platform():
    """Training in bfloat16 on accelerators, everything else in float32."""
    assert [config.precision_on("auto", platform) for platform in ("cpu", "gpu", "tpu")] == [
        "float32", "bfloat16", "bfloat16"]
    assert {job: config.parse(job, config.base_config(job)).precision for job in (
        "pretrain", "finetune", "probe", "evaluate", "sample")} == {
        "pretrain": "auto", "finetune": "auto", "probe": "float32", "evaluate": "float32", "sample": "float32"}


def test_verify_skips_what_the_run_removes_meanwhile(store, tmp_path, monkeypatch, capsys):
    """Seen to fail with the removed step called damaged."""
    def removed(folder, step, mesh):
        shutil.rmtree(pathlib.Path(folder) / str(step))
        return {"problem": "a file is missing"}

    assert code_of_a_run(store, tmp_path / "run", 1) == 0
    monkeypatch.setattr(verify.checkpoint, "verify", removed)
    found = verify.run(config.VerifyConfig(path=str(tmp_path / "run")), str(tmp_path))
    assert found["checked"] == 0 and "has removed it in the meantime" in capsys.readouterr().err
