"""Compares the model's gradients with finite differences in float64: every parameter, attention back-ends, remat."""

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.config import ModelConfig
from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model

STEP = 1e-6
TOKENS = np.random.default_rng(0).integers(0, 7, (2, 9))


def compare(attention, remat, rng):
    config = ModelConfig("igpt_tiny", layers=2, embed=8, heads=2, mlp=12, attention=attention, remat=remat)
    model = Model(config, 7, 3, "float64")
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape)), model.abstract_parameters())
    loss = jax.jit(lambda p: objectives.nats_per_token(model.logits(p, TOKENS), TOKENS).mean())
    gradients = jax.jit(jax.grad(loss))(params)

    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    for _ in range(8):
        direction = jnp.asarray(rng.normal(size=flat.shape))
        ahead, behind = (loss(unflatten(flat + by * direction)) for by in (STEP, -STEP))
        exact = jax.flatten_util.ravel_pytree(gradients)[0] @ direction
        assert abs((ahead - behind) / (2 * STEP) - exact) < 1e-7, (attention, remat, exact)

    # One parameter of each tensor by itself, so that none hides behind the others.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        index = tuple(rng.integers(0, n) for n in leaf.shape)

        def moved(by, path=path, index=index):
            return loss(jax.tree_util.tree_map_with_path(lambda p, x: x.at[index].add(by) if p == path else x, params))

        numeric = (moved(STEP) - moved(-STEP)) / (2 * STEP)
        assert abs(numeric - leaf[index]) < 1e-8, (attention, path, numeric, leaf[index])


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    generator = np.random.default_rng(0)
    for attention, remat in (("reference", "none"), ("blocked", "none"), ("blocked", "full")):
        compare(attention, remat, generator)
