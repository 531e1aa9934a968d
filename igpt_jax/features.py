"""What the layers know of an image: features of all of them from one forward pass.

B batch, T tokens, D embed, L layers; P = L + 1 places in the residual stream.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igpt_jax.attention import attention
from igpt_jax.model import Block, Model, norm

KINDS = ("normalized", "residual")


def pooled(model: Model, params: dict[str, Any], tokens_BT: jax.Array, kind: str = "normalized") -> jax.Array:
    """Features [P, B, D] float32 or wider: the stream before block 0, 1, ... and after the last, averaged.

    Args:
      model, params: the model.
      tokens_BT: palette indices.
      kind: normalized: after the next norm, as the paper's f^l = mean of n^l (Section 2.2: block l's attention norm;
        after the last block the final norm). residual: the stream itself, which the author's later answer points at.
    """
    gpt = model.bind(params)

    def pool(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
        wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        return (norm(wide, gain_D) if kind == "normalized" else wide).mean(axis=1)

    def block(block: Block, x_BTD: jax.Array, _):
        o_BTNH = attention(*block.qkv(x_BTD), causal=True, backend=gpt.config.attention)
        return block.after_attention(x_BTD, o_BTNH), pool(x_BTD, block.attention_norm_D[...])

    x_BTD, features_LBD = gpt.scan_blocks(block, gpt.embed(tokens_BT))
    return jnp.concatenate([features_LBD, pool(x_BTD, gpt.final_norm_D[...])[None]])


def make_feature_step(model: Model, kind: str) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """(params, tokens_BT) -> features [B, P, D] float32, for `evaluation.over_split`."""
    def feature_step(params: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
        return pooled(model, params, tokens_BT, kind).swapaxes(0, 1).astype(jnp.float32)

    return feature_step
