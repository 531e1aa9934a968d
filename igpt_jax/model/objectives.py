"""Training objectives: how attention looks, what the model sees of the tokens, where the loss counts, and the loss.

A new objective is one class here, one row of OBJECTIVES, and its name in `config.model.OBJECTIVES`.

B batch, T tokens, V palette, K classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from igpt_jax.config import PretrainConfig
from igpt_jax.parallel.sharding import constrain

COLORS = 1  # folded into the key of a view: random colors draw from another stream than the places they go to


class View(NamedTuple):
    """What a model sees of a batch, and where its loss counts."""
    tokens_BT: jax.Array  # int32
    hidden_BT: jax.Array | None = None  # bool: pixels whose color embedding is zero; None: none
    scored_BT: jax.Array | None = None  # bool: pixels whose loss counts; None: all


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Each pixel from those before it (paper, Section 2.1). Also the interface of all objectives."""
    causal: ClassVar[bool] = True  # attention sees only what came before, and the model has a start vector
    random: ClassVar[bool] = False  # views are drawn at random: evaluation can average over several

    @classmethod
    def of(cls, config: PretrainConfig) -> "Autoregressive":
        """The objective with the settings of a job's config."""
        return cls()

    def view_of_step(self, key: jax.Array | None, tokens_BT: jax.Array, palette_size: int) -> View:
        """What a training step sees, whatever the mesh.

        Args:
          key: the run's, folded with the step; None where views are not random.
          tokens_BT: the batch.
          palette_size: V.
        """
        return View(tokens_BT)

    def view_of_examples(self, tokens_BT: jax.Array, ids_B: jax.Array, palette_size: int, seed: int,
                         number: jax.Array | int) -> View:
        """What evaluation sees of each example: the same at any batch size and on any mesh.

        Args:
          tokens_BT: the examples.
          ids_B: their places in their split.
          palette_size: V.
          seed: chooses other views.
          number: of an example's view, from 0.
        """
        return View(tokens_BT)

    def loss(self, logits_BTV: jax.Array, tokens_BT: jax.Array, view: View) -> jax.Array:
        """What training lowers: mean negative log likelihood, nats per pixel that counts."""
        return nats_per_token(logits_BTV, tokens_BT).mean()


@dataclasses.dataclass(frozen=True)
class Masked(Autoregressive):
    """Hidden pixels from all others, as BERT does (paper, Section 2.1)."""
    mask_ratio: float = 0.15  # probability that a pixel is chosen

    causal: ClassVar[bool] = False
    random: ClassVar[bool] = True

    @classmethod
    def of(cls, config: PretrainConfig) -> "Masked":
        return cls(config.mask_ratio)

    def view_of_step(self, key: jax.Array, tokens_BT: jax.Array, palette_size: int) -> View:
        # The whole batch's places are drawn at once and in float32, so that mesh, microbatches and precision agree.
        uniform_BT = jax.random.uniform(key, tokens_BT.shape, jnp.float32)
        noise_BT = jax.random.randint(jax.random.fold_in(key, COLORS), tokens_BT.shape, 0, palette_size, jnp.int32)
        return self._corrupt(tokens_BT, self._chosen(uniform_BT), constrain(noise_BT, "BT"))

    def view_of_examples(self, tokens_BT: jax.Array, ids_B: jax.Array, palette_size: int, seed: int,
                         number: jax.Array | int) -> View:
        key, tokens = jax.random.fold_in(jax.random.key(seed), number), tokens_BT.shape[1]

        def draws(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = jax.random.fold_in(key, index)
            return (jax.random.uniform(own, (tokens,), jnp.float32),
                    jax.random.randint(jax.random.fold_in(own, COLORS), (tokens,), 0, palette_size, jnp.int32))

        uniform_BT, noise_BT = jax.vmap(draws)(ids_B)
        return self._corrupt(tokens_BT, self._chosen(uniform_BT), constrain(noise_BT, "BT"))

    def loss(self, logits_BTV: jax.Array, tokens_BT: jax.Array, view: View) -> jax.Array:
        """The mean over an image's chosen pixels, then over images (released code)."""
        return nats_per_image(logits_BTV, tokens_BT, view.scored_BT).mean()

    def _chosen(self, uniform_BT: jax.Array) -> jax.Array:
        """At least one pixel of each image: of 8x8 images 3 in 100,000 would have none, and no loss."""
        return constrain(uniform_BT <= jnp.maximum(self.mask_ratio, uniform_BT.min(axis=1, keepdims=True)), "BT")

    def _corrupt(self, tokens_BT: jax.Array, chosen_BT: jax.Array, noise_BT: jax.Array) -> View:
        """What the model sees where the pixels `chosen_BT` are corrupted; `noise_BT` holds random colors (unused ones
        are never computed)."""
        return View(tokens_BT, hidden_BT=chosen_BT, scored_BT=chosen_BT)


@dataclasses.dataclass(frozen=True)
class Denoising(Masked):
    """Original pixels from a picture in which a share of them has random colors."""

    def _corrupt(self, tokens_BT: jax.Array, chosen_BT: jax.Array, noise_BT: jax.Array) -> View:
        return View(jnp.where(chosen_BT, noise_BT, tokens_BT), scored_BT=chosen_BT)


Objective = Autoregressive
OBJECTIVES: Mapping[str, type[Objective]] = {"autoregressive": Autoregressive, "masked": Masked, "denoising": Denoising}


def objective_of(config: PretrainConfig) -> Objective:
    """The objective that a job's config names."""
    return OBJECTIVES[config.objective].of(config)


def over_views(look: Callable[[View], Any], objective: Objective, tokens_BT: jax.Array, ids_B: jax.Array,
               palette_size: int, views: int, seed: int) -> Any:
    """What `look(view)` gives for each of `views` views of the examples, [M, ...]; M = 1 where they are not random."""
    def one(number: jax.Array | int) -> Any:
        return look(objective.view_of_examples(tokens_BT, ids_B, palette_size, seed, number))

    if not objective.random:
        return jax.tree.map(lambda x: x[None], one(0))
    return jax.lax.map(one, jnp.arange(views))


def nats_per_token(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Cross entropy [B, T] in nats, in the dtype of the logits."""
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def nats_per_image(logits_BTV: jax.Array, tokens_BT: jax.Array, scored_BT: jax.Array | None = None) -> jax.Array:
    """Mean nats per pixel of each image, [B]: of all its pixels, or of those that count."""
    return jnp.mean(nats_per_token(logits_BTV, tokens_BT), axis=1, where=scored_BT)


def classification(logits_BK: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Mean negative log likelihood of the labels, nats per image (paper, Section 2.3)."""
    return nats_per_token(logits_BK, labels_B).mean()
