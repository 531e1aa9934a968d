"""Learning rate schedules; Adam, as in the paper (Section 3.4), with second moments in less memory; Muon."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from igpt_jax.config import ModelConfig, OptimizerConfig, UserError
from igpt_jax.model.parametrization import epsilon_multiplier, is_hidden, learning_rate_multiplier, ratios
from igpt_jax.parallel.sharding import letters_for

log = logging.getLogger(__name__)

MUON_RMS = 0.2  # of Muon's updates, about that of Adam's, so that one learning rate serves both (arXiv 2502.16982, 2.2)


def learning_rate(config: OptimizerConfig, step: jax.Array, steps: int, warmup_steps: int) -> jax.Array:
    """The learning rate of `step` (0, 1, ...): linear warm-up that reaches its peak, then the schedule.

    wsd (warm-up, stable, decay) is constant until `config.constant_until(steps)`, then falls to 0 at the end: linearly,
    or as 1 - sqrt(share of the decay done) (Hägele et al. 2024, arXiv 2405.18392).
    """
    warm = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    if config.schedule == "wsd":
        start = config.constant_until(steps)
        done = jnp.clip((step - start) / (steps - start), 0.0, 1.0)
        return config.learning_rate * warm * (1.0 - (done if config.decay_shape == "linear" else jnp.sqrt(done)))
    done = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    return config.learning_rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def warmup_steps_for(config: OptimizerConfig, steps: int, examples: int, batch_size: int) -> int:
    """Steps of warm-up; -1 in the config means one epoch. Raises UserError if warm-up would exceed the run."""
    if config.warmup_steps < 0:
        epoch = -(-examples // batch_size)
        if epoch > steps:
            log.warning("warm-up of one epoch, %d steps, exceeds steps=%d: warming up over a tenth of them.", epoch,
                        steps)
        return epoch if epoch <= steps else max(1, steps // 10)
    if config.warmup_steps > steps:
        raise UserError(f"optimizer.warmup_steps={config.warmup_steps} exceeds steps={steps}. Choose fewer.")
    return config.warmup_steps


def check_second_moment(config: OptimizerConfig) -> None:
    """Raises UserError where a second moment in bfloat16 would stand still.

    This is no rule of the config: checkpoints of such runs exist, and must be read.
    """
    if config.second_moment == "bfloat16" and config.beta2 > 0.99:
        raise UserError(f"optimizer.beta2={config.beta2} needs optimizer.second_moment=float32: a moment in bfloat16 "
                        "does not change by less than 0.4 % and would stand still. Use beta2=0.99 or less.")


def _is_matrix(params: Any) -> Any:
    """True for weights with two or more dims, not counting the layers' L; norms and the start vector have one."""
    def matrix(path, leaf):
        return len(letters_for(path[-1].key, leaf.ndim).lstrip("L")) > 1
    return jax.tree_util.tree_map_with_path(matrix, params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _bfloat16_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose second moment is stored in bfloat16 and computed in the dtype of the first."""
    adam = _adam(config)

    def rest(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return state._replace(nu=optax.tree.cast(state.nu, jnp.bfloat16))

    def update(gradients, state, params=None):
        wide = state._replace(nu=jax.tree.map(lambda v, m: v.astype(m.dtype), state.nu, state.mu))
        directions, state = adam.update(gradients, wide, params)
        return directions, rest(state)

    return optax.GradientTransformation(lambda params: rest(adam.init(params)), update)


class FactoredState(NamedTuple):
    """Adam's state with the second moment as rows (means over all but a matrix's first dim) and columns (over it)."""
    count: jax.Array
    mu: Any
    row: Any
    column: Any


def _factored_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with row x column / mean(row) for the second moment (Shazeer and Stern 2018, Algorithm 2).

    Averaged dims stay with size 1. A vector is its own row, so its updates are exactly those of Adam.
    """
    def first_dim(path, x):
        """The first dim that is not the stack of layers: each layer's matrix is factored by itself."""
        return int(letters_for(path[-1].key, x.ndim).startswith("L"))

    def factors(squares):
        def row(path, x):
            return x.mean(axis=tuple(range(first_dim(path, x) + 1, x.ndim)), keepdims=True)

        def column(path, x):
            return x.mean(axis=first_dim(path, x), keepdims=True)

        return tuple(jax.tree_util.tree_map_with_path(each, squares) for each in (row, column))

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return FactoredState(jnp.int32(0), zeros, *factors(zeros))

    def update(gradients, state, params=None):
        count = state.count + 1
        mu = optax.tree.update_moment(gradients, state.mu, config.beta1, 1)
        rows, columns = factors(jax.tree.map(jnp.square, gradients))
        row = optax.tree.update_moment(rows, state.row, config.beta2, 1)
        column = optax.tree.update_moment(columns, state.column, config.beta2, 1)

        def direction(path, m, row, column):
            # A parameter without any gradient yet has zeros here, and 0 / 0 would make its update NaN.
            mean = jnp.maximum(row.mean(axis=first_dim(path, m), keepdims=True), jnp.finfo(row.dtype).tiny)
            second = row * (column / mean) / (1 - config.beta2 ** count)
            return m / (1 - config.beta1 ** count) / (jnp.sqrt(second) + config.epsilon)

        return (jax.tree_util.tree_map_with_path(direction, mu, row, column),
                FactoredState(count, mu, row, column))

    return optax.GradientTransformation(init, update)


_ADAMS = {"float32": _adam, "bfloat16": _bfloat16_adam, "factored": _factored_adam}


def _muon_labels(params: Any) -> Any:
    """muon for the matrices of the blocks, adam for embeddings, heads, norms and the start vector."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "muon" if is_hidden(path[-1].key, leaf.ndim) else "adam", params)


def _muon_dimensions(params: Any) -> Any:
    """Which dims of each stacked weight are the rows and which the columns of a layer's matrix, all heads together.

    Rows are the product's inputs: D of LDNH and LDF, N x H of LNHD, F of LFD. The dim L is a batch of matrices.
    """
    def dimensions(path, leaf):
        letters = letters_for(path[-1].key, leaf.ndim)
        split = 2 if letters[1] == "D" else leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, leaf.ndim)))
    return jax.tree_util.tree_map_with_path(dimensions, params)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon: momentum, orthogonalized by five Newton-Schulz iterations (Jordan 2024), with updates of Adam's size."""
    orthogonalized = optax.contrib.scale_by_muon(beta=config.muon_beta, weight_dimension_numbers=_muon_dimensions)

    def sized(update: jax.Array, dimensions: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        rows, columns = (math.prod(update.shape[dim] for dim in dims) for dims in dimensions)
        return MUON_RMS * max(rows, columns) ** 0.5 * update

    def update(gradients, state, params=None):
        updates, state = orthogonalized.update(gradients, state, params)
        return jax.tree.map(sized, updates, _muon_dimensions(updates)), state

    return optax.GradientTransformation(orthogonalized.init, update)


def _multiplied(multiplier: Callable[[str, int], float]) -> optax.GradientTransformation:
    """Multiplies each array by `multiplier(name, number of dims)`."""
    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
        lambda path, x: multiplier(path[-1].key, x.ndim) * x, updates))


def make_optimizer(config: OptimizerConfig, model: ModelConfig | None = None) -> optax.GradientTransformation:
    """Update directions, before the learning rate: [clipping], Adam or Muon, [decoupled weight decay].

    Args:
      config: of the optimizer.
      model: decides the multipliers of learning rates and epsilon by its parametrization; None: standard.
    """
    moments = _ADAMS[config.second_moment](config)
    if config.name == "muon":
        moments = optax.partition({"muon": _muon(config), "adam": moments}, _muon_labels)
    chain = [moments]
    if model and ratios(model) != (1, 1):
        # Adam divides by the gradient's size, so only epsilon notices if all gradients are multiplied: gradients times
        # 1 / c are gradients with epsilon times c. Weight decay comes later and is not scaled by the width: with the
        # learning rate alone it would shrink as the model grows (Dey et al. 2025, Table 1).
        chain = [_multiplied(lambda name, ndim: 1 / epsilon_multiplier(model, name, ndim)), moments,
                 _multiplied(lambda name, ndim: learning_rate_multiplier(model, name, ndim, config.name))]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
    return optax.chain(*chain)
