"""Learning-rate schedules, and runs that branch from a step of another run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import OptimizerConfig, UserError, base_config, parse
from igpt_jax.training import loop
from igpt_jax.training.optimizer import learning_rate

WSD = {"schedule": "wsd", "decay_share": 0.5}


@pytest.mark.parametrize(("shape", "left"), [
    ("linear", lambda done: 1 - done), ("1-sqrt", lambda done: 1 - done ** 0.5)])
def test_wsd_warms_up_stays_and_decays(shape, left):
    """4 steps of warm-up, 5 at the peak, 3 of decay. Seen to fail with the decay begun a step later."""
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", decay_share=0.25, decay_shape=shape)
    rates = [float(learning_rate(config, jnp.int32(step), 12, 4)) for step in range(12)]
    expected = [0.5, 1.0, 1.5, *[2.0] * 6, *(2 * left(done / 3) for done in range(3))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_a_decay_without_wsd_is_refused():
    """Seen to fail without the rule."""
    with pytest.raises(UserError, match="decay_share=0.3 has no effect on optimizer.schedule=cosine"):
        OptimizerConfig(decay_share=0.3)


def record(steps_done, steps, warmup_steps=5, **optimizer):
    config = parse("pretrain", base_config("pretrain", f"model=igpt_tiny,steps={steps}"))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(**optimizer))
    return Metadata(config, np.zeros((2, 3), np.float32), 4, "data", steps_done, warmup_steps=warmup_steps)


@pytest.mark.parametrize(("old", "new", "resumes"), [
    ({"steps": 10, "schedule": "constant"}, {"steps": 20, **WSD}, True),  # the decay begins at step 10
    ({"steps": 10, "schedule": "constant"}, {"steps": 18, **WSD}, False),  # at step 9
    ({"steps": 20, **WSD}, {"steps": 40, **WSD}, True),
    ({"steps": 20, **WSD}, {"steps": 20, **WSD, "decay_shape": "linear"}, True),
    ({"steps": 18, **WSD}, {"steps": 40, **WSD}, False),
    ({"steps": 20}, {"steps": 20, **WSD}, False),
    ({"steps": 20, **WSD}, {"steps": 40, **WSD, "warmup_steps": -1}, False),
])
def test_a_schedule_may_change_while_all_past_rates_stay_the_same(old, new, resumes):
    """From step 10. Seen to fail with either run's decay left out of the comparison."""
    old, new = record(10, **old), record(0, **new)
    if resumes:
        assert old.check_resumable(new, "here") == ()
    else:
        with pytest.raises(UserError, match="The first 10 steps would have had other learning rates|warmup_steps=-1"):
            old.check_resumable(new, "here")


def test_a_warm_up_of_one_epoch_counts_as_long_as_it_is():
    """Seen to fail with the config's -1 compared."""
    trunk = record(10, steps=10, schedule="constant")
    assert trunk.check_resumable(record(0, steps=20, **WSD), "here") == ()
    with pytest.raises(UserError, match="other learning rates"):
        trunk.check_resumable(record(0, steps=20, warmup_steps=4, **WSD), "here")


def train(store, workdir, **more):
    """A run of a tiny model in this process; its last checkpoint's checksums and metrics lines."""
    given = base_config("pretrain", "model=igpt_tiny,steps=12,batch_size=8,precision=float32,log_every_steps=1")
    given.model.update(layers=1, embed=8, heads=1)
    given.update({"eval_every_steps": 0, "checkpoint_every_steps": 2, "keep_newest": 9, **more})
    given.data.store, given.optimizer.warmup_steps = str(store), 2
    loop.train(parse("pretrain", given), str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/nats_per_pixel"] for line in lines if "train/nats_per_pixel" in line}
    return checkpoint.load_metadata(str(workdir)).checksums, losses


def test_a_branch_equals_the_straight_run_bit_for_bit(store, tmp_path, capsys):
    """From step 6 of a constant and of a longer WSD trunk, to the end of a WSD run of 12 steps.

    Seen to fail with the branch's data order begun at step 0, and with new moments.
    """
    straight, losses = train(store, tmp_path / "straight", optimizer=WSD)
    for name, steps, optimizer in (("constant", 8, {"schedule": "constant"}), ("wsd", 16, WSD)):
        trunk = tmp_path / name
        train(store, trunk, steps=steps, optimizer=optimizer)
        found, branched = train(store, tmp_path / f"{name}-12", optimizer=WSD, branch_from=f"{trunk}/checkpoints/6")
        assert found == straight and len(found) > 30
        assert branched == {step: loss for step, loss in losses.items() if step > 6}
    assert f"resuming from step 6 of {trunk}/checkpoints/6 of 12" in capsys.readouterr().err


def test_bad_branches_are_refused(store, tmp_path, monkeypatch):
    """Before anything compiles. Seen to fail with the trunk's settings not compared, and with a branch restored last.
    """
    train(store, tmp_path / "trunk", steps=8, optimizer={"schedule": "constant"})
    monkeypatch.setattr(loop.Run, "compile", lambda run: pytest.fail("it compiles"))
    for given, message in (({"branch_from": f"{tmp_path}/trunk/checkpoints/8", "optimizer": WSD}, "The first 8 steps"),
                           ({"branch_from": f"{tmp_path}/trunk", "seed": 4, "steps": 20, "optimizer": WSD}, "seed=4"),
                           ({"branch_from": f"{tmp_path}/trunk", "steps": 8, "optimizer": {"schedule": "constant"}},
                            "is step 8, so nothing is left of steps=8"),
                           ({"branch_from": f"{tmp_path}/nowhere", "optimizer": WSD}, "holds no checkpoint")):
        with pytest.raises(UserError, match=message):
            train(store, tmp_path / "branch", **given)
