"""Muon against a step in NumPy, and its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.config import OptimizerConfig, UserError
from igpt_jax.training.optimizer import make_optimizer

MATRICES = {"query_DNH": (6, 8), "out_NHD": (8, 6), "up_DF": (6, 24), "down_FD": (24, 6)}  # rows, columns of a layer
SHAPES = {"query_DNH": (3, 6, 2, 4), "out_NHD": (3, 2, 4, 6), "up_DF": (3, 6, 24), "down_FD": (3, 24, 6)}


def orthogonalized(matrix):
    """Five Newton-Schulz iterations with the coefficients of Jordan 2024; nearly all singular values become about 1."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_equals_a_step_in_numpy():
    """Three steps of each stacked weight, float64: Nesterov momentum, corrected as Adam's; all heads are one matrix.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"blocks": {name: jnp.zeros(shape) for name, shape in SHAPES.items()}, "head_VD": jnp.zeros((5, 6))}
        optimizer = make_optimizer(OptimizerConfig(name="muon", muon_beta=0.9))
        adam = make_optimizer(OptimizerConfig())
        state, adams = optimizer.init(params), adam.init(params)
        momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(1, 4):
            gradients = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
            updates, state = optimizer.update(gradients, state, params)
            expected, adams = adam.update(gradients, adams, params)
            np.testing.assert_allclose(updates["head_VD"], expected["head_VD"], rtol=1e-12)
            for name, (rows, columns) in MATRICES.items():
                gradient = gradients["blocks"][name]
                momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
                looking_ahead = (0.9 * momentum[name] / (1 - 0.9 ** (step + 1)) + 0.1 * gradient / (1 - 0.9 ** step))
                for layer in range(3):
                    direction = orthogonalized(looking_ahead[layer].reshape(rows, columns))
                    np.testing.assert_allclose(updates["blocks"][name][layer].reshape(rows, columns),
                                               0.2 * max(rows, columns) ** 0.5 * direction, rtol=1e-9, atol=1e-12)


def test_settings_without_effect_are_refused():
    """Each in one line that names the key to set."""
    with pytest.raises(UserError, match="muon_beta=0.9 has no effect on optimizer.name=adam"):
        OptimizerConfig(muon_beta=0.9)
    with pytest.raises(UserError, match="adamw decays weights. Set optimizer.weight_decay"):
        OptimizerConfig(name="adamw")
    assert OptimizerConfig(name="adamw", weight_decay=0.1) and OptimizerConfig(weight_decay=0.1)
