"""The gradient noise scale: against gradients of known noise, and in a run."""

import json

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training import loop, noise_scale


@pytest.mark.parametrize("parts", [2, 4])
def test_known_noise_is_measured(parts):
    """Gradients of 64 examples in 20 dims with known mean and deviations: both estimates are right on average."""
    random = np.random.default_rng(0)
    mean_D, deviations_D = random.normal(size=20), random.uniform(0.5, 4, 20)

    def gradients(params, batch, key):
        return (0.0, {}), batch.mean(axis=0)

    def of_draw(key):
        examples_BD = mean_D + deviations_D * jax.random.normal(key, (64, 20))
        return noise_scale.measure(gradients, None, examples_BD, None, parts, 64)

    found = jax.jit(jax.vmap(of_draw))(jax.random.split(jax.random.key(0), 4000))
    trace, squared = (np.asarray(found[f"noise/{name}"]).mean() for name in ("trace", "squared_gradient"))
    assert trace == pytest.approx((deviations_D ** 2).sum(), rel=0.02)
    assert squared == pytest.approx((mean_D ** 2).sum(), rel=0.02)


def train(store, workdir, **more):
    given = base_config("pretrain", "model=igpt_tiny,steps=8,batch_size=8,precision=float32,objective=masked")
    given.model.update(layers=1, embed=8, heads=1, dropout=0.1)
    given.update({"eval_every_steps": 0, **more})
    given.data.store, given.optimizer.warmup_steps = str(store), 2
    loop.train(parse("pretrain", given), str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return checkpoint.load_metadata(str(workdir)).checksums, lines


def test_a_run_logs_it_and_trains_on_the_same_bits(store, tmp_path):
    """At its own steps, as a ratio of running means."""
    plain, _ = train(store, tmp_path / "plain")
    measured, lines = train(store, tmp_path / "measured", noise_scale_every_steps=3)
    assert measured == plain
    found = {line["step"]: line for line in lines if "noise/trace" in line}
    assert set(found) == {3, 6} and all(line["noise/trace"] > 0 for line in found.values())
    first, second = ([found[step][f"noise/{name}"] for name in ("trace", "squared_gradient")] for step in (3, 6))
    trace, squared = 0.9 * np.array(first) + 0.1 * np.array(second)
    assert found[6]["noise/scale_images"] == (pytest.approx(trace / squared) if squared > 0 else None)
    with pytest.raises(UserError, match="noise_scale_every_steps: batch_size=9 cannot be split into 2 microbatches"):
        train(store, tmp_path / "odd", noise_scale_every_steps=3, batch_size=9)


def test_one_bad_gradient_does_not_stay():
    """Seen to fail with NaN in the running means."""
    given = base_config("pretrain", "model=igpt_tiny,batch_size=8,precision=float32")
    given.model.update(layers=1, embed=8, heads=1)
    config = parse("pretrain", given)
    mesh = sharding.make_mesh(config.mesh)
    scale = noise_scale.NoiseScale(Model.of(config, 16, 4, mesh), config, mesh)
    bad = {"noise/trace": float("nan"), "noise/squared_gradient": 1.0}
    assert scale.smoothed(bad)["noise/scale_images"] == float("inf")
    for measured in ({"noise/trace": 6.0, "noise/squared_gradient": 2.0}, bad):
        assert scale.smoothed(measured)["noise/scale_images"] == 3
