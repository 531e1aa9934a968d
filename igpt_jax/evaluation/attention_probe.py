"""Attention-pooled probes: learned queries pool the tokens of one layer, and a linear classifier reads the result.

The form is the efficient probe of Psomas et al. 2026 (arXiv 2506.10178). The query of each head attends to the tokens
themselves, without a key projection, and averages its own slice of a value projection. One query of several heads with
a key projection (CAE; AIM, El-Nouby et al. 2024) gives the same functions: a head's query and its slice of the key
projection occur only as a product. Others normalize by batches, without learned parameters, the tokens (AIM) or the
pooled features (EP). Here both are standardized by statistics of the training split, so that no result depends on how a
batch is cut.

The features of all tokens are too many to keep. The frozen model computes them anew for each batch, and probes at all
learning rates train on them.

B batch, T tokens, D features, N heads, H = D / N, K classes, R learning rates, E examples, M views of an example.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from igpt_jax.data import order
from igpt_jax.data.codecs import Codec
from igpt_jax.data.store import Split
from igpt_jax.evaluation import exact_loss
from igpt_jax.model.features import make_token_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding

BATCH = 256  # images per step of AdamW
WARMUP = 0.1  # of the steps; a cosine schedule to 0 follows
WEIGHT_DECAY = 0.1
MEASURED = 2048  # images, evenly spaced, whose features give the statistics

Weights = dict[str, Any]


class Frozen(NamedTuple):
    """A frozen model, which of its features are read, and how."""
    model: Model
    params: Any
    mesh: Mesh
    layer: int  # 0 (the embedding) to L
    kind: str  # normalized or residual
    batch_size: int  # images at once over all devices
    codec: Codec  # of the model
    seed: int  # of the order of training, the first weights, and the views of a model whose objective hides pixels

    def features(self, views: int = 1) -> Callable[..., Any]:
        """See `make_token_step`."""
        return make_token_step(self.model, self.layer, self.kind, views, self.seed)

    def jit(self, function: Callable) -> Callable:
        """Jits a function whose result is on all devices."""
        return exact_loss.jit_over_batches(function, self.model, self.mesh)

    def over_split(self, read: Callable[[jax.Array, Any], jax.Array], given: Any, split: Split, views: int = 1,
                   ids_E: np.ndarray | None = None) -> np.ndarray:
        """The results [B, ...] of `read(features_BTD, given)` for all views of these examples (None: all), [E, M, ...].
        """
        features = self.features(views)

        def step(given: Any, tokens_BT: jax.Array, ids_B: jax.Array) -> jax.Array:
            params, given = given
            return jnp.moveaxis(features(params, tokens_BT, ids_B, lambda x_BTD: read(x_BTD, given)), 0, 1)

        return np.concatenate(list(exact_loss.over_split(self.jit(step), (self.params, given), split, self.mesh,
                                                         self.batch_size, self.codec, ids_E=ids_E)))


class Standards(NamedTuple):
    """Statistics of the features over the tokens of all images."""
    mean_D: np.ndarray
    deviation_D: np.ndarray
    gain_D: np.ndarray  # 1 / deviation of the mean over an image's standardized tokens

    @classmethod
    def of(cls, frozen: Frozen, split: Split) -> "Standards":
        """Those of at most MEASURED images. A constant feature gets deviation 1."""
        ids = np.linspace(0, split.count - 1, min(split.count, MEASURED)).astype(int)

        def moments(x_BTD: jax.Array, _: None) -> jax.Array:
            return jnp.stack([x_BTD.mean(axis=1), x_BTD.var(axis=1)], axis=1)

        found_E2D = frozen.over_split(moments, None, split, ids_E=ids)[:, 0].astype(np.float64)
        means_ED, variances_ED = found_E2D[:, 0], found_E2D[:, 1]
        mean_D, deviation_D = means_ED.mean(0), np.sqrt(variances_ED.mean(0) + means_ED.var(0))
        deviation_D = np.where(deviation_D > 1e-6 * np.abs(mean_D), deviation_D, 1.0)
        # The mean of T independent tokens has the deviation 1 / sqrt(T). Less is not amplified further.
        return cls(mean_D, deviation_D, 1 / np.maximum(means_ED.std(0) / deviation_D, frozen.model.dims.T ** -0.5))


def logits(weights: Weights, standards: Standards, features_BTD: jax.Array) -> jax.Array:
    """Logits [B, K] of one probe, in the dtype of the features."""
    mean_D, deviation_D, gain_D = (jnp.asarray(each, features_BTD.dtype) for each in standards)
    x_BTD = (features_BTD - mean_D) / deviation_D
    scores_BNT = jnp.einsum("BTD,DN->BNT", x_BTD, weights["query_DN"]) * len(mean_D) ** -0.5
    # Tokens are averaged before they are projected. This is the same, and needs no values [B, T, D].
    pooled_BND = jnp.einsum("BNT,BTD->BND", jax.nn.softmax(scores_BNT, axis=-1), x_BTD) * gain_D
    pooled_BNH = jnp.einsum("BND,DNH->BNH", pooled_BND, weights["value_DNH"])
    return jnp.einsum("BNH,NHK->BK", pooled_BNH, weights["class_NHK"]) + weights["bias_K"]


def gradients(weights_R: Weights, standards: Standards, features_BTD: jax.Array, labels_B: jax.Array,
              share_B: jax.Array) -> Weights:
    """The gradient of each probe's cross entropy, summed over the examples times their shares."""
    def loss(weights: Weights) -> jax.Array:
        nats_B = optax.softmax_cross_entropy_with_integer_labels(logits(weights, standards, features_BTD), labels_B)
        return (nats_B * share_B).sum()

    return jax.vmap(jax.grad(loss))(weights_R)


def first_weights(frozen: Frozen, classes: int, copies: int) -> Weights:
    """Equal probes [R, ...], which start as mean pooling with equal logits, in the dtype of the model's parameters."""
    dims, dtype = frozen.model.dims, frozen.model.precision.parameters
    value_DNH = jax.random.normal(jax.random.key(frozen.seed), (dims.D, dims.N, dims.H), dtype) * dims.D ** -0.5
    weights = {"query_DN": jnp.zeros((dims.D, dims.N), dtype), "value_DNH": value_DNH,
               "class_NHK": jnp.zeros((dims.N, dims.H, classes), dtype), "bias_K": jnp.zeros(classes, dtype)}
    return jax.tree.map(lambda x: jnp.stack([x] * copies), weights)


def adamw(rates: Sequence[float], steps: int) -> optax.GradientTransformation:
    """AdamW with one schedule at R peak learning rates, for arrays [R, ...]."""
    warmup = min(round(WARMUP * steps), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(1.0 if warmup == 0 else 0.0, 1.0, warmup, steps)

    def scale(moves: Weights, _: Any) -> Weights:
        return jax.tree.map(lambda x: x * jnp.asarray(rates, x.dtype).reshape(-1, *[1] * (x.ndim - 1)), moves)

    return optax.chain(optax.adamw(schedule, weight_decay=WEIGHT_DECAY), optax.stateless(scale))


@dataclasses.dataclass(frozen=True)
class Probes:
    """Probes at R learning rates, arrays [R, ...], and the statistics that they standardize with."""
    weights: Weights
    standards: Standards

    def __getitem__(self, rate: int) -> "Probes":
        """The probe at one learning rate alone."""
        return Probes(jax.tree.map(lambda x: x[rate:rate + 1], self.weights), self.standards)

    def predict(self, frozen: Frozen, split: Split, views: int = 1) -> np.ndarray:
        """Classes int [E, M, R] of all views of a split's examples."""
        def classes(features_BTD: jax.Array, weights: Weights) -> jax.Array:
            return jax.vmap(logits, (0, None, None))(weights, self.standards, features_BTD).argmax(axis=-1).T

        weights = jax.device_put(self.weights, sharding.replicated(frozen.mesh))
        return frozen.over_split(classes, weights, split, views)


def fit(frozen: Frozen, split: Split, labels_E: np.ndarray, classes: int, rates: Sequence[float], steps: int) -> Probes:
    """Fits one probe per learning rate. All see the same batches of BATCH images.

    Args:
      frozen: gives the features. Its batch size changes no result: the gradients of a batch are summed.
      split: to train on.
      labels_E: its labels, in [0, classes).
      classes: K.
      rates: peak learning rates.
      steps: of AdamW.
    """
    count = min(BATCH, split.count)
    at_once = min(frozen.batch_size, sharding.whole_batch(count, frozen.mesh))
    starts = range(0, count, at_once)
    standards, optimizer, features = Standards.of(frozen, split), adamw(rates, steps), frozen.features()
    labels_E = jax.device_put(labels_E.astype(np.int32), sharding.replicated(frozen.mesh))

    def first() -> tuple[Weights, Any, Weights]:
        weights = first_weights(frozen, classes, len(rates))
        return weights, optimizer.init(weights), jax.tree.map(jnp.zeros_like, weights)

    def add(params: Any, weights: Weights, total: Weights, labels_E: jax.Array, tokens_BT: jax.Array, ids_B: jax.Array,
            given: jax.Array) -> Weights:
        share_B = (jnp.arange(len(ids_B)) < given) / count  # the others fill up the batch
        found = features(params, tokens_BT, ids_B, lambda features_BTD: gradients(
            weights, standards, features_BTD, labels_E[ids_B], share_B.astype(features_BTD.dtype)))
        return jax.tree.map(lambda x, gradient: x + gradient[0], total, found)

    def update(weights: Weights, state: Any, total: Weights) -> tuple[Weights, Any, Weights]:
        moves, state = optimizer.update(total, state, weights)
        return optax.apply_updates(weights, moves), state, jax.tree.map(jnp.zeros_like, total)

    def batches() -> Iterator[np.ndarray]:
        for step in range(steps):
            ids = order.batch(frozen.seed, step, count, split.count)
            yield from (np.take(ids, np.arange(start, start + at_once), mode="wrap") for start in starts)

    placed = exact_loss.placed(split, batches(), frozen.mesh, frozen.codec)
    with jax.set_mesh(frozen.mesh):
        first, add, update = (frozen.jit(each) for each in (first, add, update))
        weights, state, total = first()
        for _ in tqdm(range(steps), desc=f"attention pooling, layer {frozen.layer}", unit="step", disable=None):
            for start in starts:
                total = add(frozen.params, weights, total, labels_E, *next(placed), min(at_once, count - start))
            weights, state, total = jax.block_until_ready(update(weights, state, total))
    return Probes(jax.tree.map(np.asarray, weights), standards)
