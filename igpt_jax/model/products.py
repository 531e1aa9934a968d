"""Products of activations with weights: gathered, multiplied, and their gradients summed over devices.

B batch, T tokens, D embed, N heads, H head dim, F mlp hidden; M rows, K and N columns of matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from igpt_jax.parallel import sharding, topology
from igpt_jax.parallel.sharding import gather_weight


@dataclasses.dataclass(frozen=True)
class Product:
    """How a platform multiplies activations with weights, forward and for the weights' gradients, runs the blocks, and
    caches keys and values.

    Attributes:
      multiply: (x, w, contracted) -> y. The last `contracted` dims of x [B, T, ...] meet the first ones of w.
      gradient: (x, d, dtype) -> the gradient of w from that of y, summed over B and T, in `dtype`.
      reduce_dtype: in which gradients are summed over devices, unless the computation's is wider.
      gathers_at_once, scatters_at_once: whether the compiler gathers a weight over so many devices, and scatters a sum
        over them, in one stage.
      row_major: a result [B, T, K] is laid out row by row; otherwise the compiler chooses its layout.
      unrolled: at most so many blocks run without a loop, unless the config says how many per iteration.
      cache_dtype: of cached keys and values; None: that of the computation.
    """
    multiply: Callable[[jax.Array, jax.Array, int], jax.Array]
    gradient: Callable[[jax.Array, jax.Array, Any], jax.Array]
    reduce_dtype: Any
    gathers_at_once: Callable[[int], bool] = lambda devices: True
    scatters_at_once: Callable[[int], bool] = lambda devices: True
    row_major: bool = False
    unrolled: int = 0
    cache_dtype: Any = None


# How many devices gather and scatter at once. Others sum whole arrays instead (all-reduce), also where a shard_map asks
# for a reduce-scatter (libtpu 0.0.51). That sends twice as much: iGPT-L on v5p:2x4x4 9.84 GiB for each chip and step
# instead of 7.4, and iGPT-M on v6e:4x4 a third more. In two stages they gather and scatter.
AT_ONCE: Mapping[str, tuple[Callable[[int], bool], Callable[[int], bool]]] = {
    "TPU v4": (lambda devices: devices <= 32, lambda devices: devices <= 2),
    "TPU v5e": (lambda devices: devices <= 32, lambda devices: devices <= 32 and devices != 16),
    "TPU v5p": (lambda devices: devices <= 32, lambda devices: devices <= 2),
    "TPU v6e": (lambda devices: True, lambda devices: devices <= 32 and devices != 16)}

# The most blocks that run without a loop. A loop writes what it saves for the backward pass twice: to its place in the
# stack of all layers, and once more for the next product. Without one, iGPT-L at 32x32 on v5p:2x4x4 moves 56 GiB, not
# 69. Compiling more blocks takes too long, and for a v4 more than 20 GB of the host's memory. A v5e gains nothing.
UNROLLED: Mapping[str, int] = {"TPU v4": 36, "TPU v5p": 60, "TPU v6e": 60}


def product_for(device: jax.Device, precision: str, reduce_dtype: str) -> Product:
    """The products of a device: the one place where the step's arithmetic depends on the platform."""
    dtype = jnp.dtype(reduce_dtype)
    # Compilers for TPUs choose a layout for each dim of a product. If B and T are merged first, libtpu writes the MLP's
    # gradient in float32 and column-major, and copies it to row-major: 24 to 38 GiB of a step's memory traffic.
    if device.platform != "cpu":
        chip = topology.chip_for(device.device_kind)
        # Left to itself, libtpu often lays out the saved activations with tokens as the last dim, and copies each to
        # row-major when the backward pass reads it. Row-major, iGPT-M at 64x64 on v6e:4x4 moves 205 GiB, not 266.
        name = chip.name if chip else ""
        return Product(jnp.tensordot, _gradient, dtype, *AT_ONCE.get(name, ()), row_major=device.platform == "tpu",
                       unrolled=UNROLLED.get(name, 0))
    if precision != "bfloat16":
        return Product(functools.partial(_flat, jnp.matmul), _flat_gradient, dtype)
    # XLA's CPU compiler converts a whole bfloat16 cache to float32 for each pixel, which takes longer than the weights.
    return Product(functools.partial(_flat, _product_rounded_late), _flat_gradient, dtype, cache_dtype=jnp.float32)


def project(x: jax.Array, weight: jax.Array, name: str, contracted: int, product: Product) -> jax.Array:
    """x [B, T, ...] times the parameter `weight` in the dtype of x; `name` ends with the letters of its dims."""
    # XLA's partitioner sums gradients over devices in the products' dtype. What it cannot do is done here. Its own way
    # is better where a backward pass repeats products: it gathers a weight once for both, and `_project` twice.
    wider = jnp.promote_types(x.dtype, product.reduce_dtype) != x.dtype and sharding.gradient_shards() > 1
    if wider or not product.scatters_at_once(sharding.weight_shards()):
        y = _project(x, weight, name, contracted, product)
    else:
        y = product.multiply(x, gather_weight(weight, name, x.dtype), contracted)
    return with_layout_constraint(y, Layout((0, 1, 2))) if product.row_major and y.ndim == 3 else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x: jax.Array, weight: jax.Array, name: str, contracted: int, product: Product) -> jax.Array:
    return _project_forward(x, weight, name, contracted, product)[0]


def _project_forward(x, weight, name, contracted, product):
    # The cast weight is saved, so that a backward pass that repeats the forward one gathers it once for both. It is not
    # gathered yet; XLA gathers it where a product needs it.
    cast = gather_weight(weight, name, x.dtype)
    y = product.multiply(x, sharding.gathered(cast, name, product.gathers_at_once), contracted)
    return y, (x, cast, jnp.zeros(0, weight.dtype))


def _project_backward(name, contracted, product, saved, d):
    x, cast, like = saved
    whole = sharding.gathered(cast, name, product.gathers_at_once)
    _, back = jax.vjp(lambda x: product.multiply(x, whole, contracted), x)
    letters = name.rsplit("_", 1)[-1]
    local = functools.partial(product.gradient, dtype=jnp.promote_types(x.dtype, product.reduce_dtype))
    gradient = sharding.summed_gradient(local, x, "BT" + letters[:contracted], d, "BT" + letters[contracted:], name,
                                        cast.shape, product.scatters_at_once)
    return *back(d), gradient.astype(like.dtype)


_project.defvjp(_project_forward, _project_backward)


def _gradient(x: jax.Array, d: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(x, d, (((0, 1), (0, 1)), ((), ())), preferred_element_type=dtype)


# CPUs.

def _flat(matrices: Callable, x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """A product of two matrices: XLA's CPU compiler runs the equal einsum 2.5 times slower in the training step."""
    if sharding.context_shards() > 1:  # merged into one dim, B and T could not both be sharded
        return jnp.tensordot(x, weight, contracted)
    rows, columns = x.shape[:x.ndim - contracted], weight.shape[contracted:]
    return matrices(x.reshape(math.prod(rows), -1), weight.reshape(-1, math.prod(columns))).reshape(*rows, *columns)


def _flat_gradient(x: jax.Array, d: jax.Array, dtype: Any) -> jax.Array:
    x_MK, d_MN = (each.reshape(math.prod(each.shape[:2]), -1) for each in (x, d))
    if x.dtype == jnp.bfloat16:
        product = _wide_product(_transposed(x_MK), d_MN).astype(dtype)
    else:
        product = x_MK.T @ d_MN
    return product.reshape(*x.shape[2:], *d.shape[2:])


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
