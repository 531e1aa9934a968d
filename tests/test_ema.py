"""The moving average of the parameters: its values, resuming, and jobs that read it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.jobs import convert, evaluate, finetune
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training import loop
from igpt_jax.training.steps import init_state, make_train_step


def config_of(store="", job="pretrain", **more):
    """A tiny model that averages its parameters."""
    given = base_config(job, "model=igpt_tiny,steps=12,batch_size=8,precision=float32")
    given.model.update(layers=1, embed=8, heads=1)
    given.update({"eval_every_steps": 6, **more})
    given.data.store = str(store)
    given.optimizer.update({"warmup_steps": 2, "schedule": "constant", "ema": 0.9, **more.get("optimizer", {})})
    return parse(job, given)


def test_the_average_is_numpys(decay=0.7):
    """float64, over 6 steps of which the third is skipped; then without any history, as the correction requires.

    Seen to fail with the number of steps in place of that of updates, and without the correction.
    """
    with jax.enable_x64(True):
        config = config_of(optimizer={"ema": decay}, precision="float64")
        model = Model(config.model, 16, 4, "float64")
        step = jax.jit(make_train_step(model, config, 2))
        state, rows = init_state(model, config, jax.random.key(0)), []
        for index in range(6):
            good = state["params"]
            if index == 2:
                state = {**state, "params": {**good, "head_VD": good["head_VD"].at[0, 0].set(jnp.nan)}}
            tokens = np.random.default_rng(index).integers(0, 16, (8, 16))
            state, metrics = step(state, tokens, jax.random.key(0))
            if index == 2:
                assert int(metrics["train/skipped_in_a_row"]) == 1
                state = {**state, "params": good}
            else:
                rows.append(np.asarray(state["params"]["head_VD"]))
        weights = decay ** np.arange(len(rows))[::-1]
        expected = np.tensordot(weights / weights.sum(), rows, 1)
        np.testing.assert_allclose(state["ema"]["head_VD"], expected, rtol=1e-13)
        assert state["ema"]["head_VD"].dtype == jnp.float64


@pytest.fixture(scope="module")
def trained(store, folder):
    loop.train(config_of(store), str(folder / "straight"))
    return folder / "straight"


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if "nats" in name}


def test_a_resumed_average_is_the_same_bit_for_bit(store, folder, trained):
    """Seen to fail with the average begun anew on resuming."""
    for steps in (6, 12):
        loop.train(config_of(store, steps=steps), str(folder / "resumed"))
    one, other = (checkpoint.load_metadata(str(path)).checksums for path in (trained, folder / "resumed"))
    assert one == other and one["ema/head_VD"] != one["params/head_VD"]
    assert metrics_of(trained)[12, "eval/ema_nats_per_pixel"] == metrics_of(folder / "resumed")[
        12, "eval/ema_nats_per_pixel"]


def test_jobs_read_raw_or_averaged_parameters(store, folder, trained):
    """evaluate, convert and finetune. Seen to fail with the raw parameters loaded in each of them."""
    logged = metrics_of(trained)
    assert logged[12, "eval/nats_per_pixel"] != logged[12, "eval/ema_nats_per_pixel"]
    for parameters, name in (("raw", "eval/nats_per_pixel"), ("ema", "eval/ema_nats_per_pixel")):
        given = parse("evaluate", base_config("evaluate", f"checkpoints={trained},parameters={parameters}"))
        (found,) = evaluate.run(given, str(folder / parameters))["nats_per_pixel"].values()
        assert found == pytest.approx(logged[12, name], rel=1e-6)

    mesh = sharding.make_mesh(parse("pretrain", base_config()).mesh)
    _, average, _ = checkpoint.load_model(str(trained), mesh, "float32", parameters="ema")
    given = base_config("convert", f"convert_from=orbax:{trained},convert_to=orbax:{folder}/copy,parameters=ema")
    assert convert.run(parse("convert", given), str(folder / "convert"))["max_logit_difference"] == 0
    _, copied, record = checkpoint.load_model(str(folder / "copy"), mesh, "float32")
    jax.tree.map(np.testing.assert_array_equal, copied, average)
    assert record.config.optimizer.ema == 0

    given = base_config("finetune", f"checkpoint={trained},parameters=ema,steps=1,batch_size=8,precision=float32,"
                        "data.test=held_out")
    given.optimizer.learning_rate = 1e-30
    finetune.run(parse("finetune", given), str(folder / "finetuned"))
    _, tuned, _ = checkpoint.load_model(str(folder / "finetuned"), mesh, "float32")
    np.testing.assert_array_equal(tuned["position_embed_TD"], average["position_embed_TD"])


def test_an_average_may_begin_and_end_only_if_the_change_is_accepted(store, tmp_path):
    """It begins as the parameters of the checkpoint. Seen to fail with zeros, and with the step in quarantine."""
    changed = {"accept_changes": ("optimizer.ema",)}
    loop.train(config_of(store, steps=6, optimizer={"ema": 0.0}), str(tmp_path))
    with pytest.raises(UserError, match="parameters=ema: checkpoint .* holds no moving average"):
        mesh = sharding.make_mesh(parse("pretrain", base_config()).mesh)
        checkpoint.load_model(str(tmp_path), mesh, "float32", parameters="ema")
    with pytest.raises(UserError, match="optimizer.ema=0.9 .checkpoint: 0.0"):
        loop.train(config_of(store, steps=6), str(tmp_path))
    optimizer = {"ema": 0.5}
    loop.train(config_of(store, steps=7, optimizer=optimizer, **changed), str(tmp_path))
    before, after = (checkpoint.load_model(f"{tmp_path}/checkpoints/{step}", mesh, "float32")[1] for step in (6, 7))
    _, average, _ = checkpoint.load_model(str(tmp_path), mesh, "float32", parameters="ema")
    weight = 0.5 / (1 - 0.5 ** 7)
    np.testing.assert_allclose(average["head_VD"], before["head_VD"] + weight * (after["head_VD"] - before["head_VD"]),
                               rtol=1e-4, atol=1e-9)
    loop.train(config_of(store, steps=8, optimizer={"ema": 0.0}, **changed), str(tmp_path))
    assert not any(name.startswith("ema/") for name in checkpoint.load_metadata(str(tmp_path)).checksums)
    assert not (tmp_path / "quarantine").exists()


def test_clipping_and_decay_may_begin_and_end_if_the_change_is_accepted(store, tmp_path):
    """They are entries of the optimizer's chain, so of a checkpoint's tree. Other moments are refused in one line.

    Seen to fail with a stack trace of Orbax, and in a bucket with all steps in quarantine.
    """
    accepted = ("optimizer.clip_norm", "optimizer.weight_decay", "optimizer.name", "optimizer.second_moment")
    plain, both = {}, {"clip_norm": 1.0, "weight_decay": 0.1, "name": "adamw"}
    for steps, optimizer in ((6, plain), (7, both), (8, plain)):
        loop.train(config_of(store, steps=steps, optimizer=optimizer, accept_changes=accepted), str(tmp_path))
    names = checkpoint.load_metadata(str(tmp_path)).checksums
    assert any(name.startswith("optimizer/0/mu") for name in names)
    with pytest.raises(UserError, match="accept_changes cannot change .* optimizer.second_moment"):
        loop.train(config_of(store, steps=9, optimizer={"second_moment": "bfloat16"}, accept_changes=accepted),
                   str(tmp_path))
    assert checkpoint.locate(str(tmp_path))[1] == 8 and not (tmp_path / "quarantine").exists()
