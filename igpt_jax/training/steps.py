"""The training step: a pure function of plain arrays, ready for jax.jit.

B batch, T tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from igpt_jax.config import PretrainConfig
from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training.optimizer import learning_rate, make_optimizer

# step, skipped (bad updates so far) and skipped_in_a_row: int32; params: a dict; optimizer: optax's state; where
# optimizer.spike_factor is set also usual_gradient_norm, the running mean that it multiplies.
State = dict[str, Any]

VIEW = 2**31  # folded into a step's key: what the step sees; dropout's microbatches count from 0

# The running mean of the gradient norm forgets with this factor per step, and judges nothing before so many steps.
SPIKE_DECAY, SPIKE_AFTER = 0.98, 50


def init_state(model: Model, config: PretrainConfig, key: jax.Array) -> State:
    """The state before step 0."""
    params = model.init(key)
    spikes = {"usual_gradient_norm": jnp.float32(0)} if config.optimizer.spike_factor else {}
    return {**spikes, "step": jnp.int32(0), "skipped": jnp.int32(0), "skipped_in_a_row": jnp.int32(0), "params": params,
            "optimizer": make_optimizer(config.optimizer).init(params)}


def state_shardings(model: Model, config: PretrainConfig, mesh: Mesh) -> State:
    """Where each array of the state lives: moments where their parameters do, the rest everywhere."""
    abstract = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    places = jax.tree.map(lambda _: sharding.replicated(mesh), abstract)
    for part in ("params", "optimizer"):
        places[part] = sharding.parameter_shardings(abstract[part], mesh)
    return places


def abstract_state(model: Model, config: PretrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state, for restoring and for compiling without data."""
    shapes = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                        shapes, state_shardings(model, config, mesh))


def make_train_step(model: Model, config: PretrainConfig, warmup_steps: int) -> Callable:
    """(state, tokens_BT, key, labels_B=None) -> (state, metrics); labels where the model has a class head.

    An update whose loss, gradient or learning rate is not finite, or whose gradient norm exceeds
    `optimizer.spike_factor` times its running mean over accepted updates, is skipped: it leaves parameters and moments
    exactly as they were and is counted in `skipped`; the step counter, and with it data order and schedule, goes on.
    In an accepted update a parameter that would overflow keeps its value, so parameters are always finite.
    """
    optimizer = make_optimizer(config.optimizer)
    uses_dropout = config.model.dropout > 0
    loss_fn = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def train_step(state: State, tokens_BT: jax.Array, key: jax.Array, labels_B: jax.Array | None = None
                   ) -> tuple[State, dict[str, jax.Array]]:
        random = model.objective.random or uses_dropout
        step_key = jax.random.fold_in(key, state["step"]) if random else None
        view_key = jax.random.fold_in(step_key, VIEW) if random else None
        view = model.objective.view_of_step(view_key, tokens_BT, model.dims.V)
        (loss, measured), gradients = _accumulated(loss_fn, state["params"], (tokens_BT, labels_B, view),
                                                   step_key if uses_dropout else None, config.accumulate)
        gradient_norm = optax.tree.norm(gradients)
        rate = learning_rate(config.optimizer, state["step"], config.steps, warmup_steps)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(rate)
        if config.optimizer.spike_factor:
            good, spikes = _unless_spiking(state, good, gradient_norm, config.optimizer.spike_factor)
        else:
            spikes = {}
        directions, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state["params"], directions)
        # Whether all are finite would be known only after a second pass over them, and their copies kept until then.
        params = jax.tree.map(lambda n, o: jnp.where(good & jnp.isfinite(n), n, o), params, state["params"])
        moments = jax.tree.map(lambda n, o: jnp.where(good, n, o), moments, state["optimizer"])

        state = {**spikes, "step": state["step"] + 1, "skipped": state["skipped"] + jnp.where(good, 0, 1),
                 "skipped_in_a_row": jnp.where(good, 0, state["skipped_in_a_row"] + 1),
                 "params": params, "optimizer": moments}
        return state, {**measured, "train/gradient_norm": gradient_norm, "train/learning_rate": rate,
                       "train/skipped_updates": state["skipped"],
                       "train/skipped_in_a_row": state["skipped_in_a_row"]}

    return train_step


def make_loss(model: Model, config: PretrainConfig) -> Callable:
    """(params, (tokens_BT, labels_B, view), key) -> (loss, metrics): what training lowers, L_GEN or, with a class
    head, the weighted L_GEN + L_CLF (paper, Section 2.3); means over the batch, in nats.
    """
    def loss(params: dict[str, Any], batch: tuple, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens_BT, labels_B, view = batch
        pixels_BTV, classes_BK = model.outputs(params, view.tokens_BT, key, view.hidden_BT)
        generative = model.objective.loss(pixels_BTV, tokens_BT, view)
        if classes_BK is None:
            return generative, {"train/nats_per_pixel": generative}
        weights = config.finetuning
        if weights.generative_weight == 0:
            generative = jax.lax.stop_gradient(generative)  # measured only
        classes = objectives.classification(classes_BK, labels_B)
        right = (classes_BK.argmax(axis=1) == labels_B).mean(dtype=classes.dtype)
        return (weights.generative_weight * generative + weights.class_weight * classes,
                {"train/nats_per_pixel": generative, "train/classification_nats": classes, "train/accuracy": right})

    return loss


def _accumulated(loss_and_gradients: Callable, params: dict[str, Any], batch: Any, key: jax.Array | None,
                 parts: int) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict[str, Any]]:
    """The means of loss, metrics and gradients over `parts` equal parts of the batch, one after the other.

    Part i takes every `parts`-th image from the i-th on, so that each device's own images stay with it.
    """
    if parts == 1:
        return loss_and_gradients(params, batch, key)
    in_parts = jax.tree.map(lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def part(sums, given):
        index, batch = given
        part_key = None if key is None else jax.random.fold_in(key, index)
        batch = jax.tree.map(lambda x: sharding.constrain(x, "B" + "." * (x.ndim - 1)), batch)
        found = loss_and_gradients(params, batch, part_key)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(loss_and_gradients, params, jax.tree.map(lambda x: x[0], in_parts), key))
    sums, _ = jax.lax.scan(part, zeros, (jnp.arange(parts), in_parts))
    return jax.tree.map(lambda x: x / parts, sums)


def jit_train_step(model: Model, config: PretrainConfig, mesh: Mesh, warmup_steps: int) -> Callable:
    """The jitted training step: the state stays in its shardings, and its memory is used again."""
    return jax.jit(make_train_step(model, config, warmup_steps), donate_argnums=0,
                   out_shardings=(state_shardings(model, config, mesh), None))


def _unless_spiking(state: State, good: jax.Array, gradient_norm: jax.Array,
                    factor: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether to accept an update that is otherwise good, and the running mean of the norms of accepted ones."""
    mean, accepted = state["usual_gradient_norm"], state["step"] - state["skipped"]
    unbiased = mean / (1 - SPIKE_DECAY ** jnp.maximum(accepted, 1))  # as Adam corrects its moments
    good &= (accepted < SPIKE_AFTER) | (gradient_norm <= factor * unbiased)
    moved = SPIKE_DECAY * mean + (1 - SPIKE_DECAY) * gradient_norm
    return good, {"usual_gradient_norm": jnp.where(good, moved, mean).astype(jnp.float32)}
