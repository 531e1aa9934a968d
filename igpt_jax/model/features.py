"""Pooled features of every layer from one forward pass.

B batch, T tokens, D embed, L layers; P = L + 1 points of the residual stream; M views.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.layers import pool

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
