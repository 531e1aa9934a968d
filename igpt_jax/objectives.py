"""What a model is trained for: losses in nats, and what masked training hides.

B batch, T tokens, V palette, K classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igpt_jax.model import Model
from igpt_jax.sharding import constrain


def nats_per_token(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Cross entropy [B, T] in nats, in the dtype of the logits."""
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def autoregressive(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean negative log likelihood of every pixel given those before it, nats per pixel (paper, Section 2.1)."""
    return nats_per_token(logits_BTV, tokens_BT).mean()


def masked(logits_BTV: jax.Array, tokens_BT: jax.Array, hidden_BT: jax.Array) -> jax.Array:
    """Negative log likelihood of the hidden pixels given the others, nats per hidden pixel (paper, Section 2.1).

    The mean over an image's hidden pixels, then over images (released code).
    """
    return nats_per_image(logits_BTV, tokens_BT, hidden_BT).mean()


def nats_per_image(logits_BTV: jax.Array, tokens_BT: jax.Array, hidden_BT: jax.Array | None = None) -> jax.Array:
    """Mean nats per pixel of each image, [B]: of all its pixels, or of those hidden."""
    return jnp.mean(nats_per_token(logits_BTV, tokens_BT), axis=1, where=hidden_BT)


def classification(logits_BK: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Mean negative log likelihood of the labels, nats per image (paper, Section 2.3)."""
    return nats_per_token(logits_BK, labels_B).mean()


# What is hidden. float32 draws in every precision, so that all of them hide the same.

def hidden_of_step(key: jax.Array, shape: tuple[int, int], share: float) -> jax.Array:
    """The pixels [B, T] that a step hides: each with probability `share`, whatever the mesh.

    Args:
      key: of the run, folded with the step.
    """
    return constrain(_hidden(jax.random.uniform(key, shape, jnp.float32), share), "BT")


def hidden_of_examples(ids_B: jax.Array, tokens: int, share: float, seed: int, number: jax.Array | int) -> jax.Array:
    """The pixels [B, T] that evaluation hides of each example: the same at any batch size and on any mesh.

    Args:
      ids_B: the examples' places in their split.
      tokens: T.
      share: probability that a pixel is hidden.
      seed: chooses other masks.
      number: of an example's mask, from 0.
    """
    key = jax.random.fold_in(jax.random.key(seed), number)
    draw = jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(key, index), (tokens,), jnp.float32))
    return constrain(_hidden(draw(ids_B), share), "BT")


def under_masks(look: Callable[[jax.Array | None], Any], model: Model, ids_B: jax.Array, masks: int, seed: int) -> Any:
    """What `look(hidden_BT)` gives under each of `masks` masks of the examples, [M, ...].

    A causal model looks once, M = 1, with None: nothing is hidden from it.
    """
    if model.causal:
        return jax.tree.map(lambda x: x[None], look(None))

    def one(number: jax.Array) -> Any:
        return look(hidden_of_examples(ids_B, model.dims.T, model.masked_share, seed, number))

    return jax.lax.map(one, jnp.arange(masks))


def _hidden(uniform_BT: jax.Array, share: float) -> jax.Array:
    """At least one pixel of each image: of 8x8 images 3 in 100,000 would have none, and no loss."""
    return uniform_BT <= jnp.maximum(share, uniform_BT.min(axis=1, keepdims=True))
