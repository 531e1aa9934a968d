"""Which checkpoints stay, what they say of themselves, and on which devices they open."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint, sharding, steps
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.model import Model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, config, mesh, state, abstract state, record): five saves, evaluated at all but the last."""
    config = base_config("pretrain", "model=igpt_tiny,precision=float32,keep_newest=2")
    config.keep_steps = (30,)
    config.model.update(layers=2, embed=16, heads=2)
    config = parse("pretrain", config)
    model = Model(config.model, 17, 4, "float32")
    mesh = sharding.make_mesh(config.mesh)
    abstract = steps.abstract_state(model, config, mesh)
    state = steps.init_state(model, config, jax.random.key(0))
    palette_VC = np.random.default_rng(0).uniform(-1, 1, (17, 3)).astype(np.float32)
    workdir = pathlib.Path(os.path.relpath(tmp_path_factory.mktemp("run")))  # as users type it: Orbax wants it absolute
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        assert checkpoints.latest_step is None
        for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6), (50, None)):
            metrics = {} if loss is None else {"eval/nats_per_pixel": loss}
            record = checkpoint.Record(config, palette_VC, 4, "abc", step, metrics)
            checkpoints.save(state, record)
    return workdir, config, mesh, state, abstract, record


def test_kept_are_the_newest_the_best_and_the_named(run):
    """Must fail with one more of the newest kept, and with the best taken for the worst."""
    assert checkpoint.steps_in(run[0] / "checkpoints") == [20, 30, 40, 50]


def test_a_step_describes_itself_and_gives_its_parameters(run):
    """Config, palette to the last bit, parameters alone. Must fail with the palette rounded to six digits."""
    workdir, config, mesh, state, _, record = run
    for typed, step in ((workdir, 50), (workdir / "checkpoints", 50), (workdir / "checkpoints" / "20", 20)):
        model, params, stored = checkpoint.load_model(str(typed), mesh, "float32", attention="reference")
        assert (stored.config, stored.image_size, stored.steps_done) == (config, 4, step)
        assert stored.palette_VC.tobytes() == record.palette_VC.tobytes()
        assert model.config.attention == "reference" and model.dims.V == 17
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state["params"]), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_run_with_other_settings_is_refused_with_each_difference(run):
    """Must fail with `model.attention` compared as well."""
    workdir, config, _, state, abstract, record = run
    reference = dataclasses.replace(config.model, attention="reference")
    free = dataclasses.replace(config, log_every_steps=7, model=reference)
    other = dataclasses.replace(config, seed=4, optimizer=dataclasses.replace(config.optimizer, beta2=0.999))
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        restored, stored = checkpoints.restore(abstract, dataclasses.replace(record, config=free))
        assert stored.steps_done == 50
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        expected = r"beta2=0.999 \(checkpoint: 0.95\); seed=4 \(checkpoint: 0\); another pixel"
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(abstract, dataclasses.replace(record, config=other, data_fingerprint="other"))
        with pytest.raises(UserError, match="another palette"):
            checkpoints.restore(abstract, dataclasses.replace(record, palette_VC=record.palette_VC[::-1]))


def test_steps_may_change_only_where_no_schedule_depends_on_them(run):
    """Neither a cosine nor a warm-up of one epoch, which may not fit. Must fail with `steps` always free."""
    _, config, *_, record = run
    longer = dataclasses.replace(record, config=dataclasses.replace(config, steps=config.steps * 2))
    with pytest.raises(UserError, match="steps=2000000"):
        record.check_continues(longer, "here")

    def constant(of, warmup_steps):
        optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=warmup_steps)
        return dataclasses.replace(of, config=dataclasses.replace(of.config, optimizer=optimizer))

    constant(record, 10).check_continues(constant(longer, 10), "here")
    with pytest.raises(UserError, match="steps=2000000"):
        constant(record, -1).check_continues(constant(longer, -1), "here")


@pytest.mark.parametrize("typed", ["", "{}", "{}/checkpoints/99", "{}/../nowhere"])
def test_no_checkpoint_there(typed, tmp_path):
    """Must fail with a FileNotFoundError let through."""
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.load_record(typed.format(tmp_path))
