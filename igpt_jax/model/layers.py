"""Layers of Image GPT: norm, activation, dropout, the head, and one transformer block.

Sources: "paper" is Chen et al. 2020, "Generative Pretraining from Pixels"; the released code is the authority on
the norm (RMS-style, gain only), the activation (x sigmoid(1.702 x)), the start vector and the absence of biases.

B batch, T tokens, S key tokens, D embed, N heads, H head dim, F mlp hidden, V vocabulary, L layers, K classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from igpt_jax.model.dims import Dims
from igpt_jax.model.products import Product, project
from igpt_jax.parallel.sharding import constrain

NORM_EPSILON = 1e-5  # inside the root, as released


def _wide(x: jax.Array) -> jax.Array:
    """x in float32, or unchanged if it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def norm(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
    """gain * x / sqrt(mean(x^2) + 1e-5), computed in float32 or wider; no mean is subtracted (released code)."""
    x = _wide(x_BTD)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return (x * scale * gain_D).astype(x_BTD.dtype)


@jax.custom_vjp
def activation(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), computed in float32 or wider and rounded once: bfloat16 would make the factor 1.703.

    The backward pass saves x alone and recomputes the sigmoid.
    """
    wide = _wide(x)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def _activation_backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    wide = _wide(x)
    share = jax.nn.sigmoid(1.702 * wide)
    return ((d * share * (1 + 1.702 * wide * (1 - share))).astype(x.dtype),)


activation.defvjp(lambda x: (activation(x), x), _activation_backward)


def features(x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
    """The stream, after a norm if a gain is given; float32 or wider."""
    wide_BTD = _wide(x_BTD)
    return wide_BTD if gain_D is None else norm(wide_BTD, gain_D)


def pool(x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
    """The mean [B, D] of `features` over positions."""
    return features(x_BTD, gain_D).mean(axis=1)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of x and scales the rest up; returns x without a key or rate."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def read_out(n_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32 or wider."""
    # The logits' gradient is rounded to the dtype of n, like that of any other activation. In float32 it would make two
    # float32 products in each step, which matrix units are slowest at.
    wide = jnp.promote_types(n_BTD.dtype, jnp.float32)
    return jnp.einsum("BTD,VD->BTV", n_BTD, head_VD, preferred_element_type=wide)


def _read_out_backward(saved: tuple[jax.Array, jax.Array], d_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    n_BTD, head_VD = saved
    d_BTV = d_BTV.astype(n_BTD.dtype)
    return jnp.einsum("BTV,VD->BTD", d_BTV, head_VD), jnp.einsum("BTV,BTD->VD", d_BTV, n_BTD)


read_out.defvjp(lambda n_BTD, head_VD: (read_out(n_BTD, head_VD), (n_BTD, head_VD)), _read_out_backward)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)). Holds the stacked weights [L, ...] of all blocks when built."""

    def __init__(self, dims: Dims, make: Callable[[str], jax.Array], rate: float, product: Product,
                 branch_multiplier: float = 1.0):
        self.attention_norm_D = nnx.Param(make("attention_norm_D"))
        self.query_DNH = nnx.Param(make("query_DNH"))
        self.key_DNH = nnx.Param(make("key_DNH"))
        self.value_DNH = nnx.Param(make("value_DNH"))
        self.out_NHD = nnx.Param(make("out_NHD"))
        self.mlp_norm_D = nnx.Param(make("mlp_norm_D"))
        self.up_DF = nnx.Param(make("up_DF"))
        self.down_FD = nnx.Param(make("down_FD"))
        self.rate, self.product, self.branch_multiplier = rate, product, branch_multiplier

    def scaled(self) -> "Block":
        """This block, whose queries are divided by sqrt(H) from now on, as `attention` takes them."""
        # The weights are scaled, before they are rounded. If the queries were, XLA would do so for TPUs in a pass over
        # memory of its own, in the forward pass and again in the backward one.
        self.query_DNH = nnx.Param(self.query_DNH[...] * self.query_DNH.shape[-1] ** -0.5)
        return self

    def _project(self, x: jax.Array, name: str, contracted: int = 1) -> jax.Array:
        return project(x, getattr(self, name)[...], name, contracted, self.product)

    def qkv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, N, H] of the normalized residual stream."""
        n_BTD = norm(x_BTD, self.attention_norm_D[...])
        return tuple(constrain(self._project(n_BTD, name), "BTNH")
                     for name in ("query_DNH", "key_DNH", "value_DNH"))

    def after_attention(self, x_BTD: jax.Array, o_BTNH: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The rest of the block: projects the heads' outputs, adds them to the stream, and adds the MLP."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        out_BTD = self._project(o_BTNH, "out_NHD", contracted=2)
        x_BTD = self._added(x_BTD, out_BTD, attention_key)
        hidden_BTF = self._project(norm(x_BTD, self.mlp_norm_D[...]), "up_DF")
        hidden_BTF = constrain(activation(hidden_BTF), "BTF")
        out_BTD = self._project(hidden_BTF, "down_FD")
        return self._added(x_BTD, out_BTD, mlp_key)

    def _added(self, x_BTD: jax.Array, out_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """The residual stream plus the output of a branch."""
        out_BTD = dropout(out_BTD, self.rate, key)
        return constrain(x_BTD + (out_BTD if self.branch_multiplier == 1 else self.branch_multiplier * out_BTD), "BTD")
