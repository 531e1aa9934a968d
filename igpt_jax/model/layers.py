"""Layers of Image GPT: norm, activation, dropout, products with weights, and one transformer block.

Sources: "paper" is Chen et al. 2020, "Generative Pretraining from Pixels"; the released code is the authority on
the norm (RMS-style, gain only), the activation (x sigmoid(1.702 x)), the start vector and the absence of biases.

B batch, T tokens (pixels), S key tokens, D embed, N heads, H head dim, F mlp hidden, V palette, L layers, K classes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from igpt_jax.model.dims import Dims
from igpt_jax.parallel import sharding
from igpt_jax.parallel.sharding import constrain, gather_weight

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


def pool(x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
    """The mean [B, D] of the stream over positions, after a norm if a gain is given; float32 or wider."""
    wide_BTD = _wide(x_BTD)
    return (wide_BTD if gain_D is None else norm(wide_BTD, gain_D)).mean(axis=1)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of x and scales the rest up; returns x without a key or rate."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


Product = Callable[[jax.Array, jax.Array, int], jax.Array]


@functools.cache
def product_for(platform: str, precision: str) -> Product:
    """How a platform multiplies activations with weights: the one place where the step depends on it.

    Returns:
      A function of x [B, T, ...], a weight in the compute dtype, and the number of dims to contract: the last of x with
      the first of the weight.
    """
    # Compilers for TPUs choose a layout for each dim of a product. If B and T are merged first, libtpu writes the MLP's
    # gradient in float32 and column-major, and copies it to row-major: 24 to 38 GiB of a step's memory traffic.
    if platform != "cpu":
        return jnp.tensordot
    return functools.partial(_flat, _product_rounded_late if precision == "bfloat16" else jnp.matmul)


def _flat(product: Callable, x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """A product of two matrices: XLA's CPU compiler runs the equal einsum 2.5 times slower in the training step."""
    if sharding.context_shards() > 1:  # merged into one dim, B and T could not both be sharded
        return jnp.tensordot(x, weight, contracted)
    rows, columns = x.shape[:x.ndim - contracted], weight.shape[contracted:]
    return product(x.reshape(math.prod(rows), -1), weight.reshape(-1, math.prod(columns))).reshape(*rows, *columns)


@jax.custom_vjp
def _product_rounded_late(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """a b in bfloat16, accumulated in float32 and then rounded, as other compilers already do; gradients likewise."""
    # XLA's CPU compiler has fast bfloat16 products only with float32 results, and only of [M, K] x [K, N] as the arrays
    # lie in memory. It converts all others to float32 first, at half the speed. So the result is float32 and is rounded
    # in an operation of its own, and the backward pass transposes its factors itself.
    return _wide_product(a_MK, b_KN).astype(a_MK.dtype)


def _wide_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    return jnp.matmul(a_MK, b_KN, preferred_element_type=jnp.float32)


def _product_rounded_late_backward(saved: tuple[jax.Array, jax.Array], d_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    a_MK, b_KN = saved
    return (_wide_product(d_MN, _transposed(b_KN)).astype(a_MK.dtype),
            _wide_product(_transposed(a_MK), d_MN).astype(b_KN.dtype))


def _transposed(x: jax.Array) -> jax.Array:
    """The transpose, written to memory in row-major order."""
    # Two things would make XLA compute the product in float32. It folds a transpose into the product that reads it: the
    # barrier prevents this. And JAX asks for a transpose in column-major layout: the extra dim resets the layout.
    return jax.lax.optimization_barrier(x.T[None])[0]


_product_rounded_late.defvjp(lambda a_MK, b_KN: (_product_rounded_late(a_MK, b_KN), (a_MK, b_KN)),
                             _product_rounded_late_backward)


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

    def __init__(self, dims: Dims, make: Callable[[str], jax.Array], dtype: Any, rate: float, product: Product,
                 branch_multiplier: float = 1.0):
        self.attention_norm_D = nnx.Param(make("attention_norm_D"))
        self.query_DNH = nnx.Param(make("query_DNH"))
        self.key_DNH = nnx.Param(make("key_DNH"))
        self.value_DNH = nnx.Param(make("value_DNH"))
        self.out_NHD = nnx.Param(make("out_NHD"))
        self.mlp_norm_D = nnx.Param(make("mlp_norm_D"))
        self.up_DF = nnx.Param(make("up_DF"))
        self.down_FD = nnx.Param(make("down_FD"))
        self.dtype, self.rate, self.product, self.branch_multiplier = dtype, rate, product, branch_multiplier

    def _weight(self, name: str) -> jax.Array:
        return gather_weight(getattr(self, name)[...], name.rsplit("_", 1)[-1], self.dtype)

    def _project(self, x: jax.Array, name: str, contracted: int = 1) -> jax.Array:
        return self.product(x, self._weight(name), contracted)

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
