"""Learning rate schedule and Adam, as the paper trains (Section 3.4)."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax

from igpt_jax.config import OptimizerConfig, UserError
from igpt_jax.sharding import letters_for

log = logging.getLogger(__name__)


def learning_rate(config: OptimizerConfig, step: jax.Array, steps: int, warmup_steps: int) -> jax.Array:
    """The learning rate of `step` (0, 1, ...): linear warm-up that reaches its peak, then cosine to 0 or constant."""
    warm = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    done = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    return config.learning_rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def warmup_steps_for(config: OptimizerConfig, steps: int, examples: int, batch_size: int) -> int:
    """Steps of warm-up; -1 in the config means one epoch. Raises UserError where warm-up would not end."""
    if config.warmup_steps < 0:
        epoch = -(-examples // batch_size)
        if epoch > steps:
            log.warning("warm-up of one epoch, %d steps, exceeds steps=%d: warming up over a tenth.", epoch, steps)
        return epoch if epoch <= steps else max(1, steps // 10)
    if config.warmup_steps > steps:
        raise UserError(f"optimizer.warmup_steps={config.warmup_steps} exceeds steps={steps}. Choose fewer.")
    return config.warmup_steps


def _is_matrix(params: Any) -> Any:
    """True for weights with two dims or more besides the stack of layers; norms and the start vector have one."""
    def matrix(path, leaf):
        return len(letters_for(path[-1].key, leaf.ndim).lstrip("L")) > 1
    return jax.tree_util.tree_map_with_path(matrix, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's update directions before the learning rate: [clipping], moments, [decoupled weight decay]."""
    chain = [optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
    return optax.chain(*chain)
