"""Pooled features of every layer from one forward pass, and the features of each token at one layer.

B batch, T tokens, D embed, L layers; P = L + 1 points of the residual stream; M views.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.layers import features, pool

KINDS = ("normalized", "residual")


def pooled(model: Model, params: dict[str, Any], tokens_BT: jax.Array, kind: str = "normalized",
           hidden_BT: jax.Array | None = None) -> jax.Array:
    """Features [P, B, D] float32 or wider: the stream before block 0, 1, ... and after the last, averaged over T.

    Args:
      model, params: the model.
      tokens_BT: the examples.
      kind: normalized: after the next norm, as the paper's f^l = mean of n^l (Section 2.2: block l's attention norm;
        after the last block the final norm). residual: the stream itself, as a later answer of the author suggests.
      hidden_BT: pixels whose colors are zeroed in a model that is not causal; None: none.
    """
    gpt = model.bind(params)

    def read(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
        return pool(x_BTD, gain_D if kind == "normalized" else None)

    x_BTD, features_LBD = gpt.stream(tokens_BT, hidden_BT=hidden_BT, read=read)
    return jnp.concatenate([features_LBD, read(x_BTD, gpt.final_norm_D[...])[None]])


def make_feature_step(model: Model, kind: str, views: int = 1, seed: int = 0) -> Callable[..., jax.Array]:
    """(params, tokens_BT, ids_B) -> features [B, M, P, D] float32, for `evaluation.over_split`.

    A model with a random objective sees M = `views` views of each image, since it was never trained on a whole one.
    Others see it once, M = 1.
    """
    def feature_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array | None = None) -> jax.Array:
        def look(view: objectives.View) -> jax.Array:
            return pooled(model, params, view.tokens_BT, kind, view.hidden_BT).astype(jnp.float32)

        features_MPBD = objectives.over_views(look, model.objective.for_features(), tokens_BT, ids_B, model.dims.V,
                                             views, seed)
        return features_MPBD.transpose(2, 0, 1, 3)

    return feature_step


def of_tokens(model: Model, params: dict[str, Any], tokens_BT: jax.Array, layer: int, kind: str = "normalized",
              hidden_BT: jax.Array | None = None) -> jax.Array:
    """Features [B, T, D] of each token at one layer, 0 to L, float32 or wider. Their mean over T is `pooled`'s.

    The blocks after that layer are not computed. Arguments are those of `pooled`.
    """
    gpt = model.bind(params)
    x_BTD, _ = gpt.stream(tokens_BT, hidden_BT=hidden_BT, count=layer)
    gain_D = gpt.final_norm_D[...] if layer == model.dims.L else gpt.blocks.attention_norm_D[...][layer]
    return features(x_BTD, gain_D if kind == "normalized" else None)


def make_token_step(model: Model, layer: int, kind: str, views: int = 1, seed: int = 0) -> Callable[..., Any]:
    """(params, tokens_BT, ids_B, read) -> the results of `read(features_BTD)` for each view of the images, [M, ...].

    `read` reduces the features of a view before the next view is computed. Views are those of `make_feature_step`.
    """
    def token_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array,
                   read: Callable[[jax.Array], Any]) -> Any:
        def look(view: objectives.View) -> Any:
            return read(of_tokens(model, params, view.tokens_BT, layer, kind, view.hidden_BT))

        return objectives.over_views(look, model.objective.for_features(), tokens_BT, ids_B, model.dims.V, views,
                                     seed)

    return token_step
