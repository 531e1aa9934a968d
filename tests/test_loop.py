"""The training loop's own faults, in this process: damaged images, replicas that differ, the watchdog."""

import errno
import json
import pathlib
import shutil

import pytest
from etils import epath

from igpt_jax import checkpoint, config
from igpt_jax.checkpoint import verification
from igpt_jax.data.store import reader
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
