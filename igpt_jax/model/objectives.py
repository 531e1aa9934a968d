"""Training objectives: whether attention is causal, what the model sees of an image, and the loss.

A new objective is one subclass of `Objective`, one row of OBJECTIVES, and its name in `config.model.OBJECTIVES`.

B batch, T tokens, V vocabulary, K classes, M views.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.config import PretrainConfig
from igpt_jax.parallel.sharding import constrain

# Folded into an example's key: random colors and mask ratios come from other streams than the choice of pixels.
COLORS, RATIO = 1, 2


class View(NamedTuple):
    """What a model sees of a batch, and where its loss counts."""
    tokens_BT: jax.Array  # int32
    hidden_BT: jax.Array | None = None  # bool: pixels whose color embedding is zero; None: none
    scored_BT: jax.Array | None = None  # bool: pixels whose loss counts; None: all


class Objective:
    """What a model is trained for."""
    causal: ClassVar[bool]  # attention sees earlier pixels only, and the model has a start vector
    random: ClassVar[bool] = False  # views are random, so that evaluation can average over several
    bound: ClassVar[bool] = False  # the mean loss over views is an upper bound on -log p(image), per pixel

    @classmethod
    def of(cls, config: PretrainConfig) -> "Objective":
        """The objective with the settings of a job's config."""
        return cls()

    def stratum(self, number: jax.Array | int, views: int) -> "Objective":
        """The objective that draws view `number`, from 0, of several of an example."""
        return self

    def for_features(self) -> "Objective":
        """The objective that draws the views from which features and classes are read."""
        return self

    def view(self, tokens_BT: jax.Array, keys_B: jax.Array | None, vocabulary: int) -> View:
        """What the model sees of each example.

        Args:
          tokens_BT: the examples.
          keys_B: from `example_keys`, one per example. An example's view depends on its own key only, not on batch
            size, microbatches or mesh. None where views are not random.
          vocabulary: V.
        """
        return View(tokens_BT)

    def loss(self, logits_BTV: jax.Array, tokens_BT: jax.Array, view: View) -> jax.Array:
        """The training loss of a batch: mean negative log likelihood, nats per token."""
        return nats_per_token(logits_BTV, tokens_BT).mean()


class Autoregressive(Objective):
    """Predicts each pixel from the pixels before it (paper, Section 2.1)."""
    causal = True


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """Predicts hidden pixels from all others, as BERT does (paper, Section 2.1)."""
    mask_ratio: float = 0.15  # probability that a pixel is chosen

    causal = False
    random = True

    @classmethod
    def of(cls, config: PretrainConfig) -> "Masked":
        return cls(config.mask_ratio)

    def view(self, tokens_BT: jax.Array, keys_B: jax.Array, vocabulary: int) -> View:
        chosen_BT = self._chosen(keys_B, tokens_BT.shape[1])
        return View(tokens_BT, hidden_BT=chosen_BT, scored_BT=chosen_BT)

    def loss(self, logits_BTV: jax.Array, tokens_BT: jax.Array, view: View) -> jax.Array:
        """The mean over the chosen pixels of an image, then over images (released code)."""
        return nats_per_image(logits_BTV, tokens_BT, view.scored_BT).mean()

    def _chosen(self, keys_B: jax.Array, tokens: int) -> jax.Array:
        """The pixels to predict, bool [B, T]. Drawn in float32 at any precision, so that precisions agree on them."""
        uniform_BT = jax.vmap(lambda key: jax.random.uniform(key, (tokens,), jnp.float32))(keys_B)
        # Never below the smallest number of the image: a small image could else have no chosen pixel, and no loss.
        threshold_B1 = jnp.maximum(self.mask_ratio, uniform_BT.min(axis=1, keepdims=True))
        return constrain(uniform_BT <= threshold_B1, "BT")


class Denoising(Masked):
    """Predicts the original colors of pixels that were replaced by random ones."""

    def view(self, tokens_BT: jax.Array, keys_B: jax.Array, vocabulary: int) -> View:
        chosen_BT = self._chosen(keys_B, tokens_BT.shape[1])

        def colors(key: jax.Array) -> jax.Array:
            return jax.random.randint(jax.random.fold_in(key, COLORS), tokens_BT.shape[1:], 0, vocabulary, jnp.int32)

        return View(jnp.where(chosen_BT, jax.vmap(colors)(keys_B), tokens_BT), scored_BT=chosen_BT)


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
    """Predicts hidden pixels from all others, at every mask ratio t: masked diffusion (Shi et al. 2024, 2406.04329).

    The number k of an image's hidden tokens is uniform in 1..T, and t = k/T. The loss is 1/t times the nats of the
    hidden tokens, over T. Its expectation is an upper bound on -log p(image) / T, where p draws the tokens in a random
    order, each from the model's distribution given those before it. In a random order, the last k tokens are a random
    set of k, and the next one to draw is a random token of it. So the expected loss is the mean over all orders of
    -log p(image | order) / T (Hoogeboom et al. 2021, 2110.02037), which is no less than -log of the mean p.

    Shi et al. draw t from U(0, 1) and hide each token with probability t. Their loss has the same expectation, but
    1/t gives it an infinite variance unless t is cut off near 0. Here nothing is cut off: k is at least 1.
    """
    low: jax.Array | float = 0.0  # k is uniform from low T + 1 to high T; high = 0: k = 1
    high: jax.Array | float = 1.0

    causal = False
    random = True

    @classmethod
    def of(cls, config: PretrainConfig) -> "Diffusion":
        return cls().for_features() if config.finetuning else cls()

    @property
    def bound(self) -> bool:
        return self.high == 1

    def stratum(self, number: jax.Array | int, views: int) -> "Diffusion":
        width = (self.high - self.low) / views
        return Diffusion(self.low + number * width, self.low + (number + 1) * width)

    def for_features(self) -> "Diffusion":
        """One hidden token. Most mask ratios would hide what is in the image."""
        return Diffusion(high=0.0)

    def view(self, tokens_BT: jax.Array, keys_B: jax.Array, vocabulary: int) -> View:
        tokens = tokens_BT.shape[1]

        def hidden(key: jax.Array) -> jax.Array:
            uniform = jax.random.uniform(jax.random.fold_in(key, RATIO), (), jnp.float32)
            return jax.random.permutation(key, tokens) <= (self.low + (self.high - self.low) * uniform) * tokens

        hidden_BT = constrain(jax.vmap(hidden)(keys_B), "BT")
        return View(tokens_BT, hidden_BT=hidden_BT, scored_BT=hidden_BT)

    def loss(self, logits_BTV: jax.Array, tokens_BT: jax.Array, view: View) -> jax.Array:
        """1/t times the sum, over T, is the mean over an image's hidden tokens. Then the mean over images."""
        return nats_per_image(logits_BTV, tokens_BT, view.scored_BT).mean()


OBJECTIVES: Mapping[str, type[Objective]] = {"autoregressive": Autoregressive, "masked": Masked, "denoising": Denoising,
                                             "diffusion": Diffusion}


def objective_of(config: PretrainConfig) -> Objective:
    """The objective that a job's config names."""
    return OBJECTIVES[config.objective].of(config)


def example_keys(key: jax.Array, ids_B: jax.Array) -> jax.Array:
    """One PRNG key per example [B], from its id: its index in the batch (training) or in its split (evaluation)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids_B)


def over_views(look: Callable[[View], Any], objective: Objective, tokens_BT: jax.Array, ids_B: jax.Array | None,
               vocabulary: int, views: int, seed: int) -> Any:
    """The results of `look(view)` for each view of the examples, stacked: [M, ...]. M = 1 where views are not random.

    Args:
      look: a function of one view.
      objective: draws the views.
      tokens_BT: the examples.
      ids_B: their indices in their split: an example has the same views in any batch. None where views are not random.
      vocabulary: V.
      views: of each example.
      seed: another seed gives other views.
    """
    if not objective.random:
        return jax.tree.map(lambda x: x[None], look(objective.view(tokens_BT, None, vocabulary)))

    def one(number: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return look(objective.stratum(number, views).view(tokens_BT, example_keys(key, ids_B), vocabulary))

    return jax.lax.map(one, jnp.arange(views))


def nats_per_token(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Cross entropy [B, T] in nats, in the dtype of the logits."""
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def nats_per_image(logits_BTV: jax.Array, tokens_BT: jax.Array, scored_BT: jax.Array | None = None) -> jax.Array:
    """Mean nats per token of each image, [B]: over all its tokens, or over those where `scored_BT` is true."""
    return jnp.mean(nats_per_token(logits_BTV, tokens_BT), axis=1, where=scored_BT)


def classification(logits_BK: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Mean negative log likelihood of the labels, nats per image (paper, Section 2.3)."""
    return nats_per_token(logits_BK, labels_B).mean()
