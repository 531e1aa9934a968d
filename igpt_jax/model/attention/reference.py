"""Plain softmax attention. B batch, T query tokens, S key tokens, N heads, H head dim."""

import jax
import jax.numpy as jnp

SAVED = "attention"  # the name by which remat policies recognize the output of attention


def reference(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool) -> jax.Array:
    """Softmax attention for any platform; holds all scores [B, N, T, S] at once."""
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=wide)
    if causal:
        T, S = scores_BNTS.shape[-2:]
        scores_BNTS = jnp.where(jnp.tri(T, S, S - T, dtype=bool), scores_BNTS, jnp.finfo(wide).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
