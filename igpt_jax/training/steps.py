"""The training step: a pure function of plain arrays, ready for jax.jit.

B batch, T tokens.
"""

import math
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

# The training state: step, skipped (updates so far) and skipped_in_a_row, int32; params, a dict; optimizer, optax's
# state. With optimizer.spike_factor also usual_gradient_norm, the running mean that the factor multiplies. With
# optimizer.ema also ema, the moving average of the parameters.
State = dict[str, Any]

VIEW = 2**31  # folded into a step's key for the examples' views; dropout folds in the index of the microbatch, from 0

SPIKE_DECAY = 0.98  # of the running mean of the gradient norm, per accepted update
SPIKE_AFTER = 50  # accepted updates before the first update can count as a spike: a young mean says little


def init_state(model: Model, config: PretrainConfig, key: jax.Array) -> State:
    """The state before step 0."""
    params = model.init(key)
    optional = {"usual_gradient_norm": jnp.float32(0)} if config.optimizer.spike_factor else {}
    if config.optimizer.ema:
        optional["ema"] = jax.tree.map(jnp.zeros_like, params)  # the first update gives the parameters themselves
    return {**optional, "step": jnp.int32(0), "skipped": jnp.int32(0), "skipped_in_a_row": jnp.int32(0),
            "params": params, "optimizer": make_optimizer(config.optimizer, config.model).init(params)}


def state_shardings(model: Model, config: PretrainConfig, mesh: Mesh) -> State:
    """The sharding of each array of the state: moments and averages like their parameters, counters replicated."""
    abstract = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), abstract)
    for name in {"params", "optimizer", "ema"} & set(abstract):
        shardings[name] = sharding.parameter_shardings(abstract[name], mesh)
    return shardings


def abstract_state(model: Model, config: PretrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state, for restoring and for compiling without data."""
    shapes = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    return jax.tree.map(lambda leaf, sharded: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded),
                        shapes, state_shardings(model, config, mesh))


def make_train_step(model: Model, config: PretrainConfig, warmup_steps: int) -> Callable:
    """(state, tokens_BT, key, labels_B=None) -> (state, metrics); labels where the model has a class head.

    An update whose loss, gradient or learning rate is not finite, or whose gradient norm exceeds
    `optimizer.spike_factor` times its running mean over accepted updates, is skipped. A skipped update changes no bit
    of parameters and moments and is counted in `skipped`; the step counter still advances, and with it data order and
    schedule. In an accepted update a parameter that would overflow keeps its value, so parameters are always finite.
    """
    optimizer = make_optimizer(config.optimizer, config.model)
    loss_fn = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def train_step(state: State, tokens_BT: jax.Array, key: jax.Array, labels_B: jax.Array | None = None
                   ) -> tuple[State, dict[str, jax.Array]]:
        batch, dropout_key = loss_inputs(model, config, state["step"], tokens_BT, key, labels_B)
        (loss, measured), gradients = accumulated(loss_fn, state["params"], batch, dropout_key, config.accumulate)
        gradient_norm = optax.tree.norm(gradients)
        rate = learning_rate(config.optimizer, state["step"], config.steps, warmup_steps)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(rate)
        if config.optimizer.spike_factor:
            good, optional = _unless_spiking(state, good, gradient_norm, config.optimizer.spike_factor)
        else:
            optional = {}
        # A skipped update is computed too, and then not chosen: XLA fuses the choice into the last operation of the
        # update, so it costs no further pass over the state.
        directions, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state["params"], directions)
        # Each parameter is judged by itself. To skip the whole update where one of them overflows would take a second
        # pass over all parameters, and both copies of them in memory until it ends.
        params = jax.tree.map(lambda n, o: jnp.where(good & jnp.isfinite(n), n, o), params, state["params"])
        moments = jax.tree.map(lambda n, o: jnp.where(good, n, o), moments, state["optimizer"])
        if config.optimizer.ema:
            optional["ema"] = jax.tree.map(lambda n, o: jnp.where(good, n, o),
                                           _averaged(state, params, config.optimizer.ema), state["ema"])

        state = {**optional, "step": state["step"] + 1, "skipped": state["skipped"] + jnp.where(good, 0, 1),
                 "skipped_in_a_row": jnp.where(good, 0, state["skipped_in_a_row"] + 1),
                 "params": params, "optimizer": moments}
        return state, {**measured, "train/gradient_norm": gradient_norm, "train/learning_rate": rate,
                       "train/skipped_updates": state["skipped"],
                       "train/skipped_in_a_row": state["skipped_in_a_row"]}

    return train_step


def loss_inputs(model: Model, config: PretrainConfig, step: jax.Array, tokens_BT: jax.Array, key: jax.Array,
                labels_B: jax.Array | None) -> tuple[tuple, jax.Array | None]:
    """What the loss of a step reads: the batch (tokens_BT, labels_B, view), and the key of dropout, if any is used."""
    # Keys follow from the run's key and the step, and no key is part of the state. A resumed run therefore draws what
    # the interrupted one would have drawn.
    uses_dropout = config.model.dropout > 0
    step_key = jax.random.fold_in(key, step) if model.objective.random or uses_dropout else None
    keys_B = None
    if model.objective.random:
        keys_B = objectives.example_keys(jax.random.fold_in(step_key, VIEW), jnp.arange(len(tokens_BT)))
    # Views are drawn for the whole batch, before it is split. So they do not depend on the number of microbatches.
    view = model.objective.view(tokens_BT, keys_B, model.dims.V)
    return (tokens_BT, labels_B, view), step_key if uses_dropout else None


def make_loss(model: Model, config: PretrainConfig) -> Callable:
    """(params, (tokens_BT, labels_B, view), key) -> (loss, metrics), means over the batch in nats.

    The loss is L_GEN or, with a class head, the weighted sum of L_GEN and L_CLF (paper, Section 2.3).
    """
    def loss(params: dict[str, Any], batch: tuple, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens_BT, labels_B, view = batch
        pixels_BTV, classes_BK = model.outputs(params, view.tokens_BT, key, view.hidden_BT)
        generative = model.objective.loss(pixels_BTV, tokens_BT, view)
        if classes_BK is None:
            return generative, {"train/nats_per_pixel": model.dims.C * generative}
        weights = config.finetuning
        if weights.generative_weight == 0:
            generative = jax.lax.stop_gradient(generative)  # logged only
        classes = objectives.classification(classes_BK, labels_B)
        right = (classes_BK.argmax(axis=1) == labels_B).mean(dtype=classes.dtype)
        return (weights.generative_weight * generative + weights.class_weight * classes,
                {"train/nats_per_pixel": model.dims.C * generative, "train/classification_nats": classes,
                 "train/accuracy": right})

    return loss


def accumulated(loss_and_gradients: Callable, params: dict[str, Any], batch: Any, key: jax.Array | None,
                microbatches: int) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict[str, Any]]:
    """Gradient accumulation: loss, metrics and gradients, averaged over microbatches of equal size.

    It averages whatever the function returns, as a tree of arrays. Each microbatch draws its dropout from `key`, folded
    with its index.
    """
    if microbatches == 1:
        return loss_and_gradients(params, batch, key)
    # Microbatch i takes every `microbatches`-th image from the i-th on. A device holds consecutive images of the
    # batch, so each microbatch takes an equal share of every device's images, and none moves to another device. With 8
    # images, 2 devices and 2 microbatches:
    #
    #     device          0          1
    #     images       0 1 2 3    4 5 6 7
    #     first        0   2      4   6
    #     second         1   3      5   7
    stacked = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(sums, indexed):
        index, batch = indexed
        own_key = None if key is None else jax.random.fold_in(key, index)
        batch = jax.tree.map(lambda x: sharding.constrain(x, "B" + "." * (x.ndim - 1)), batch)
        return jax.tree.map(jnp.add, sums, loss_and_gradients(params, batch, own_key)), None

    # The sums start at zero instead of at the first microbatch's gradients. The loop's body is then the only copy of
    # the forward and backward pass in the program.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(loss_and_gradients, params, jax.tree.map(lambda x: x[0], stacked), key))
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), stacked))
    return jax.tree.map(lambda x: x / microbatches, sums)


def jit_train_step(model: Model, config: PretrainConfig, mesh: Mesh, warmup_steps: int) -> Callable:
    """The jitted training step. It keeps the state's shardings and overwrites the state's memory (donation)."""
    # With donation the new state takes the old one's memory. Without it a step would need room for two copies of
    # parameters and moments.
    return jax.jit(make_train_step(model, config, warmup_steps), donate_argnums=0,
                   compiler_options=model.compiler_options,
                   out_shardings=(state_shardings(model, config, mesh), None))


def _averaged(state: State, params: dict[str, Any], decay: float) -> dict[str, Any]:
    """The moving average of the parameters after an accepted update to `params`.

    After t updates it is sum_i decay^(t-i) p_i / sum_i decay^(t-i), i = 1 ... t, as Adam corrects its moments (Kingma
    and Ba 2015, Section 3): the first parameters have no more weight than others. So it needs no correction on reading.
    An average that begins at a later step starts as the parameters of that step, which keep a share of decay^n.
    """
    updates = state["step"] - state["skipped"] + 1
    weight = (1 - decay) / -jnp.expm1(updates * math.log(decay))  # of the newest; expm1 keeps digits that 1 - d^t loses
    return jax.tree.map(lambda a, p: (a + weight * (p - a)).astype(a.dtype), state["ema"], params)


def _unless_spiking(state: State, good: jax.Array, gradient_norm: jax.Array,
                    factor: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether to accept an update that is otherwise good, and the running mean of the norms of accepted ones."""
    mean, accepted = state["usual_gradient_norm"], state["step"] - state["skipped"]
    unbiased = mean / (1 - SPIKE_DECAY ** jnp.maximum(accepted, 1))  # as Adam corrects its moments
    # A spike does not enter the mean that it is judged by: otherwise a run of spikes would soon look usual.
    good &= (accepted < SPIKE_AFTER) | (gradient_norm <= factor * unbiased)
    moved = SPIKE_DECAY * mean + (1 - SPIKE_DECAY) * gradient_norm
    return good, {"usual_gradient_norm": jnp.where(good, moved, mean).astype(jnp.float32)}
