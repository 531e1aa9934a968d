"""Checkpoints: retention, metadata, verification on read, quarantine, failed saves."""

import dataclasses
import json
import logging
import os
import pathlib
import random
import shutil
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from igpt_jax import checkpoint
from igpt_jax.checkpoint import manager, watching
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.data.store import Store
from igpt_jax.jobs import verify
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.runtime.exits import Unsaved
from igpt_jax.storage import hashes
from igpt_jax.training.steps import abstract_state, init_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, config, mesh, state, abstract state, metadata): five saves, evaluated at all but the last."""
    config = base_config("pretrain", "model=igpt_tiny,precision=float32,keep_newest=2")
    config.keep_steps = (30,)
    config.model.update(layers=2, embed=16, heads=2)
    config = parse("pretrain", config)
    model = Model(config.model, 17, 4, "float32")
    mesh = sharding.make_mesh(config.mesh)
    abstract = abstract_state(model, config, mesh)
    state = init_state(model, config, jax.random.key(0))
    palette_VC = np.random.default_rng(0).uniform(-1, 1, (17, 3)).astype(np.float32)
    workdir = pathlib.Path(os.path.relpath(tmp_path_factory.mktemp("run")))  # relative, as users type it
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        assert checkpoints.latest_step is None
        for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6), (50, None)):
            metrics = {} if loss is None else {"eval/nats_per_pixel": loss}
            metadata = checkpoint.Metadata(config, palette_VC, 4, "abc", step, metrics)
            checkpoints.save(state, metadata)
    return workdir, config, mesh, state, abstract, metadata


def test_the_newest_the_best_and_the_named_steps_stay(run):
    """Seen to fail with one fewer of the newest kept, and with the worst step kept in place of the best."""
    assert checkpoint.steps_in(run[0] / "checkpoints") == [20, 30, 40, 50]


def with_data(config, **given):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))


def test_losses_of_other_held_out_images_choose_no_best_step(run, monkeypatch):
    """Seen to fail with losses of two splits compared, and with those of another store's split of the same name."""
    workdir, config, *_ = run
    other = {20: {"held_out_fingerprint": "of another store"}, 40: {"config": with_data(config, held_out="test")}}
    monkeypatch.setattr(manager, "read_metadata", lambda folder, step, read=manager.read_metadata: dataclasses.replace(
        read(folder, step), **other.get(step, {})))
    for held_out, best in (("held_out", 30), ("test", 40), ("", 40), ("none", None)):
        with checkpoint.Checkpoints(workdir, with_data(config, held_out=held_out)) as checkpoints:
            assert checkpoints.best_step == best


def test_a_step_describes_itself_and_gives_its_parameters(run):
    """Config, palette to the last bit, parameters alone. Seen to fail with the palette rounded to six digits."""
    workdir, config, mesh, state, _, metadata = run
    for path, step in ((workdir, 50), (workdir / "checkpoints", 50), (workdir / "checkpoints" / "20", 20)):
        model, params, stored = checkpoint.load_model(str(path), mesh, "float32", attention="reference")
        assert (stored.config, stored.image_size, stored.steps_done) == (config, 4, step)
        assert stored.palette_VC.tobytes() == metadata.palette_VC.tobytes()
        assert model.config.attention == "reference" and model.dims.V == 17
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state["params"]), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_run_with_other_settings_is_refused_with_each_difference(run):
    """Seen to fail with `model.attention` compared as well."""
    workdir, config, _, state, abstract, metadata = run
    reference = dataclasses.replace(config.model, attention="reference")
    free = dataclasses.replace(config, log_every_steps=7, model=reference)
    other = dataclasses.replace(config, seed=4, optimizer=dataclasses.replace(config.optimizer, beta2=0.999))
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        restored, stored = checkpoints.restore(lambda _: abstract, dataclasses.replace(metadata, config=free))
        assert stored.steps_done == 50
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        expected = r"beta2=0.999 \(checkpoint: 0.95\); seed=4 \(checkpoint: 0\); data='other'"
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(lambda _: abstract,
                                dataclasses.replace(metadata, config=other, data_fingerprint="other"))
        with pytest.raises(UserError, match="palette="):
            checkpoints.restore(lambda _: abstract, dataclasses.replace(metadata, palette_VC=metadata.palette_VC[::-1]))


def test_steps_may_change_only_where_no_schedule_depends_on_them(run):
    """Neither a cosine nor a warm-up of one epoch, which may not fit. Seen to fail with `steps` always free."""
    _, config, *_, metadata = run
    longer = dataclasses.replace(metadata, config=dataclasses.replace(config, steps=config.steps * 2))

    def constant(of, warmup_steps):
        optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=warmup_steps)
        return dataclasses.replace(of, config=dataclasses.replace(of.config, optimizer=optimizer))

    constant(metadata, 10).check_resumable(constant(longer, 10), "here")
    for stored, asked in (metadata, longer), (constant(metadata, -1), constant(longer, -1)):
        with pytest.raises(UserError, match="steps=2000000 .* --config.accept_changes=steps stretches the schedule"):
            stored.check_resumable(asked, "here")


def test_a_store_that_moved_is_asked_for(run, tmp_path):
    """Its path may be relative to another folder. Seen to fail with a store of other images there."""
    metadata = run[-1]

    def trained_on(store, images=""):
        return dataclasses.replace(metadata, config=with_data(metadata.config, store=store), data_fingerprint=images)

    (tmp_path / "a").symlink_to(pathlib.Path(__file__).parent / "data" / "store_format2")
    images = Store.open(tmp_path / "a").split("train").fingerprint
    for store in (f"{tmp_path}/a", f"{tmp_path}/a,tfds:cifar10", ""):
        assert checkpoint.store_of(trained_on(store, images)) == store
    with pytest.raises(UserError, match=f"does not hold the images .* pass --config.data.store={tmp_path}/a"):
        checkpoint.store_of(trained_on(f"{tmp_path}/a", "of others"))
    for store in (f"{tmp_path}/b", f"{tmp_path}/a,{tmp_path}/b"):
        assert checkpoint.store_of(trained_on(store), "mine") == "mine"
        with pytest.raises(UserError, match=f"{store}, which is not there. .* pass --config.data.store=DIR"):
            checkpoint.store_of(trained_on(store))


@pytest.mark.parametrize("path", ["", "{}", "{}/checkpoints/99", "{}/../nowhere"])
def test_no_checkpoint_there(path, tmp_path):
    """Seen to fail with a FileNotFoundError let through."""
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.load_metadata(path.format(tmp_path))


@pytest.fixture
def copy(run, tmp_path):
    """(workdir, step 50 of it, config, abstract state, state, metadata): a copy to damage."""
    workdir, config, _, state, abstract, metadata = run
    shutil.copytree(workdir, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / "checkpoints" / "50", config, abstract, state, metadata


def same(one, other):
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes()
               for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def damage(file, kind, rng):
    """One flipped bit, half of the file, up to 4 KiB zeroed, or no file at all. False where that changes nothing."""
    data = bytearray(file.read_bytes())
    if kind == "deleted" or not data:
        file.unlink()
        return True
    before = bytes(data)
    if kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "halved":
        del data[len(data) // 2:]
    else:
        start = rng.randrange(max(1, len(data) - 4096))
        data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    file.write_bytes(data)
    return bytes(data) != before


@pytest.mark.parametrize("kind", ["flipped", "halved", "zeroed", "deleted"])
def test_no_damage_to_a_file_is_restored(copy, kind, caplog):
    """Each file of the newest step in turn is damaged: the step goes to quarantine with the reason, and the step before
    is used. Only SHA256SUMS itself may be missing, since a run can be killed before writing it; the arrays are still
    compared.

    `benchmarks/faults.py files` does it 20 times per file. Seen to fail without the file hashes (flips in places
    that nothing reads).
    """
    workdir, step, config, abstract, state, metadata = copy
    rng = random.Random(kind)
    kept = workdir.parent / "kept"
    step.rename(kept)
    files = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert len(files) > 15
    for name in files:
        shutil.rmtree(workdir / "quarantine", ignore_errors=True)
        shutil.rmtree(step, ignore_errors=True)
        shutil.copytree(kept, step)
        if not damage(step / name, kind, rng):
            continue
        with checkpoint.Checkpoints(workdir, config) as checkpoints:
            restored, stored = checkpoints.restore(lambda _: abstract, metadata)
        assert same(restored, state), name
        if name == hashes.HASHES and kind == "deleted":
            continue
        assert stored.steps_done == 40, f"{name} {kind} was not detected"
        (quarantined,) = (workdir / "quarantine").iterdir()
        assert quarantined.name == "50" and (quarantined / "problem.txt").read_text().strip() in caplog.text


@pytest.mark.parametrize("tree", ["params", "training"])
def test_a_bit_that_flips_in_memory_after_the_checksum_is_detected(run, tmp_path, monkeypatch, tree):
    """Orbax gets an array that differs by one bit from the one that was summed. Seen to fail without the comparison."""
    _, config, _, state, abstract, metadata = run
    save = ocp.save_checkpointables_async

    def flip_and_save(path, trees, **options):
        leaves, structure = jax.tree.flatten(trees[tree])
        index = next(i for i, leaf in enumerate(leaves) if leaf.size > 100)
        bits = np.asarray(leaves[index]).copy()
        bits.view(np.uint32).reshape(-1)[77] ^= 1 << 3
        leaves[index] = jax.device_put(bits, leaves[index].sharding)
        return save(path, {**trees, tree: jax.tree.unflatten(structure, leaves)}, **options)

    with checkpoint.Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=10), blocking=True)
        monkeypatch.setattr(ocp, "save_checkpointables_async", flip_and_save)
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=20), blocking=True)
        restored, stored = checkpoints.restore(lambda _: abstract, metadata)
    assert stored.steps_done == 10 and same(restored, state)
    assert "is not what was saved" in (tmp_path / "quarantine" / "20" / "problem.txt").read_text()


def test_where_all_steps_are_damaged_nothing_starts_from_scratch(copy):
    """Other jobs use an older step and move nothing. Seen to fail with None returned if all are in quarantine."""
    workdir, step, config, abstract, _, metadata = copy
    mesh = sharding.make_mesh(config.mesh)
    for other in step.parent.iterdir():
        data = next(other.glob("params/d/*"))
        damage(data, "flipped", random.Random(1))
        if other.name == "30":  # this one stays good at first
            damage(damage_later := data, "flipped", random.Random(1))
    assert checkpoint.load_model(str(workdir), mesh, "float32")[2].steps_done == 30
    with pytest.raises(UserError, match="50 is damaged: params/d/.* is not what was written. Name another step."):
        checkpoint.load_model(str(step), mesh, "float32")
    damage(damage_later, "flipped", random.Random(1))
    for _ in range(2):
        with checkpoint.Checkpoints(workdir, config) as checkpoints:
            with pytest.raises(UserError, match="all checkpoints of .* are damaged"):
                checkpoints.restore(lambda _: abstract, metadata)
    assert len(list((workdir / "quarantine").iterdir())) == 4


def test_killed_saves_and_removals_leave_nothing(copy):
    """Files of the user stay. Seen to fail without the sweep, and with every name of that ending swept."""
    workdir, step, config, *_ = copy
    for name in ("60.orbax-checkpoint-tmp", "30.deleting"):
        (step.parent / name / "params").mkdir(parents=True)
    mine = ["007", "50²", "70", "80.deleting", "notes.deleting"]
    for name in mine[:2]:
        shutil.copytree(step, step.parent / name)
    for name in mine[2:4]:
        (step.parent / name).write_text("a file")
    (step.parent / mine[4]).mkdir()
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        assert checkpoints.steps == [20, 30, 40, 50]
    assert sorted(child.name for child in step.parent.iterdir()) == sorted(["20", "30", "40", "50", *mine])


@pytest.mark.parametrize("name", ["6", "checkpoints", "run[1]", "a,*?", "imgs:"])
def test_workdirs_may_have_any_name(run, tmp_path, name):
    """Steps 4 and 6 in a workdir of any name: both are found, watched and verified, and 4 is used where 6 is damaged.

    Seen to fail with a step recognized by its name, and with Orbax's own glob over the files that it merges.
    """
    _, config, mesh, state, abstract, metadata = run
    workdir, path = tmp_path / name, str(tmp_path / name)
    with checkpoint.Checkpoints(path, config) as checkpoints:
        for steps_done in (4, 6):
            checkpoints.save(state, dataclasses.replace(metadata, steps_done=steps_done), blocking=True)
    (workdir / "config.json").write_text('{"job": "pretrain"}')
    (workdir / "result.json").write_text('{"status": "done"}')
    steps = [f"{path}/checkpoints/{step}" for step in (4, 6)]
    assert list(watching.follow(path, 1e-9, 0)) == steps and watching.listed(path) == steps[1:]
    assert list(watching.follow(f"{path}/checkpoints", 1e-9, 0)) == steps
    assert watching.listed(f"{path}/checkpoints/*") == steps
    assert list(watching.follow(f"{steps[0]},{steps[1]}", 1e-9, 0)) == steps
    damage(next((workdir / "checkpoints" / "6").glob("params/d/*")), "flipped", random.Random(1))
    assert checkpoint.load_model(path, mesh, "float32")[2].steps_done == 4
    verified = [checkpoint.verify(folder, step, mesh)["problem"] for folder, step in verify._steps(path)]
    assert verified[0] is None and "is not what was written" in verified[1]
    with checkpoint.Checkpoints(path, config) as checkpoints:
        restored, stored = checkpoints.restore(lambda _: abstract, metadata)
    assert stored.steps_done == 4 and same(restored, state)


def test_a_renamed_step_is_damaged(copy):
    """Seen to fail without comparing the step in the metadata with the folder's name."""
    workdir, step, config, abstract, _, metadata = copy
    shutil.copytree(step.parent / "20", step.parent / "60")
    shutil.copytree(step, step.parent / "best")
    assert checkpoint.load_metadata(str(workdir)).steps_done == 50
    with pytest.raises(UserError, match="60 is damaged: its metadata is that of step 20"):
        checkpoint.load_metadata(str(step.parent / "60"))
    with pytest.raises(UserError, match="in a folder of another name"):
        checkpoint.load_metadata(str(step.parent / "best"))
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        assert checkpoints.restore(lambda _: abstract, metadata)[1].steps_done == 50
    assert [child.name for child in (workdir / "quarantine").iterdir()] == ["60"]


def test_links_to_steps(copy, monkeypatch):
    """Links: `latest` names its target; `60` is a renamed step, whose target stays; a step that is a link
    to a larger disk can be superseded. Seen to fail with links moved, and with rmtree of one."""
    workdir, step, config, abstract, state, metadata = copy
    (step.parent / "latest").symlink_to("50")
    (step.parent / "60").symlink_to(step.absolute())
    (step.parent / "40").rename(workdir / "moved")
    (step.parent / "40").symlink_to(workdir / "moved")
    assert checkpoint.locate(f"{step.parent}/latest")[1] == 50
    monkeypatch.chdir(step.parent / "20")
    assert checkpoint.locate(".")[1] == checkpoint.load_metadata(".").steps_done == 20
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        assert checkpoints.restore(lambda _: abstract, metadata)[1].steps_done == 50
        assert not checkpoint.verify(str(step.parent), 50, sharding.make_mesh(config.mesh))["problem"]
        assert "that of step 50 (the link to" in (workdir / "quarantine" / "60" / "problem.txt").read_text()
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=70, metrics={}), blocking=True)
        assert checkpoints.steps == [20, 30, 50, 70] and (workdir / "moved" / "commit_success.txt").exists()


def test_a_later_evaluation_decides_the_best(copy):
    """Step 50 is evaluated after a restart, as the best: newer steps do not supersede it. Seen to fail with the metrics
    kept in memory only."""
    workdir, step, config, _, state, metadata = copy
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        checkpoints.add_metrics(50, {"eval/nats_per_pixel": 0.5})
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        for step_done in (60, 70, 80):
            checkpoints.save(state, dataclasses.replace(metadata, steps_done=step_done, metrics={}))
    assert checkpoint.steps_in(workdir / "checkpoints") == [30, 50, 70, 80]
    assert checkpoint.load_metadata(str(step)).metrics == {"eval/nats_per_pixel": 0.5}


def test_a_failed_save_is_logged_counted_and_retried(run, tmp_path, monkeypatch, caplog):
    """Two saves fail; the retry is due after a pause and succeeds. A blocking save raises after three failures.

    Seen to fail with the error of the thread dropped, and with the retry never due.
    """
    _, config, _, state, _, metadata = run
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    save = ocp.save_checkpointables_async
    left = 2

    def fail(*arguments, **options):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(ocp, "save_checkpointables_async", fail)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.ERROR), checkpoint.Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=1))
        assert not checkpoints.retry_due and "Step 1 could not be saved: [Errno 28] No space left" in caplog.text
        clock[0] += 1.5
        assert checkpoints.retry_due
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=2))
        clock[0] += 1.5
        assert not checkpoints.retry_due and checkpoints.failed_saves == 2
        clock[0] += 1
        assert checkpoints.retry_due
        checkpoints.save(state, dataclasses.replace(metadata, steps_done=3), blocking=True)
        assert checkpoints.steps == [3] and not checkpoints.retry_due
        left = 3
        with pytest.raises(Unsaved, match="step 4 .* No space .* resumes from step 3"):
            checkpoints.save(state, dataclasses.replace(metadata, steps_done=4), blocking=True)


def test_accepted_changes_that_change_arrays_are_refused_and_nothing_is_quarantined(run):
    """Seen to fail with the model's and the optimizer's keys compared alone: the step was taken for damaged."""
    workdir, config, _, _, abstract, metadata = run
    accepted = dataclasses.replace(config, accept_changes=("palette", "image_size", "precision", "codec"))
    steps = checkpoint.steps_of(workdir)
    for other in ({"palette_VC": metadata.palette_VC[:-1]}, {"image_size": 8}, {"classes": 10},
                  {"config": dataclasses.replace(accepted, precision="float64")},
                  {"config": dataclasses.replace(accepted, codec="grey")}):
        with (checkpoint.Checkpoints(workdir, config) as checkpoints,
              pytest.raises(UserError, match="the run has other arrays than the checkpoint .* images or palette")):
            checkpoints.restore(lambda _: abstract, dataclasses.replace(metadata, **{"config": accepted} | other))
    assert checkpoint.steps_of(workdir) == steps


def test_accepted_changes_are_recorded(run):
    """Seen to fail with all changes accepted once one is named."""
    _, config, _, _, _, metadata = run
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.001),
                                  accept_changes=("optimizer.learning_rate",))
    (change,) = metadata.check_resumable(dataclasses.replace(metadata, config=changed), "here")
    assert change == {"step": 50, "key": "optimizer.learning_rate", "from": 0.003, "to": 0.001}
    with pytest.raises(UserError, match="settings: seed=4"):
        metadata.check_resumable(dataclasses.replace(metadata, config=dataclasses.replace(changed, seed=4)), "here")
    moved = dataclasses.replace(metadata, changes=(change,), data_offset=7)
    stored = checkpoint.Metadata.from_json(json.loads(json.dumps(moved.to_json())))
    assert (stored.changes, stored.data_offset) == ([change], 7)
