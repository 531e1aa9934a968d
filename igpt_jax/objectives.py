"""What a model is trained for: losses in nats. B batch, T tokens, V palette."""

import jax
import jax.numpy as jnp


def nats_per_token(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Cross entropy [B, T] in nats, in the dtype of the logits."""
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def autoregressive(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean negative log likelihood of every pixel given those before it, nats per pixel (paper, Section 2.1)."""
    return nats_per_token(logits_BTV, tokens_BT).mean()
