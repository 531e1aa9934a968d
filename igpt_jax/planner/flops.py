"""Counts the FLOPs of a program in its jaxpr.

XLA's `cost_analysis` counts the body of a scan once, and a custom kernel as nothing. This counts matrix products alone,
as is usual: 2 x the product of all dims, times the number of iterations.
"""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

# Products of 2 T S H FLOPs in each attention kernel, by the start of its name. Forward: scores (q k), and weights x v.
# The backward kernels compute the scores again, and splash does so in both of its kernels.
KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,  # scores, dv, d weights, dk; one more where it computes dq too, as a fifth result
    "splash_mha_dq": 3,  # scores, d weights, dq
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,  # scores, dv, d weights, dq, dk
}


def count(jaxpr: Any, causal: bool = True) -> float:
    """Counts the FLOPs of a closed jaxpr over all devices, each kernel by its formula.

    Args:
      jaxpr: from `jax.make_jaxpr`.
      causal: whether attention kernels skip the masked half of the scores. Other code counts as written: the plain
        reference computes all scores.

    Raises:
      NotImplementedError: a kernel has no formula.
    """
    # Remat's backward pass repeats the forward kernels even where their results are saved. XLA drops what nothing uses,
    # and so must the count.
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(used, causal)


def _count(jaxpr: Any, causal: bool) -> float:
    return sum(_of_equation(equation, causal) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of_equation(equation: Any, causal: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)
    if name in ("pallas_call", "conv_general_dilated") or name.startswith("dot_product_attention"):
        return _of_kernel(equation, causal)
    bodies = [_count(body, causal) for body in _bodies(params)]
    if name == "cond":
        return max(bodies)
    if name == "while" and any(bodies):
        raise NotImplementedError("a while loop holds matrix products, and its length is unknown before it runs")
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}.get(name, lambda: 1)()
    return times * sum(bodies)


def _bodies(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, jitted functions."""
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    return [value for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
            if isinstance(value, kinds)]


def _of_kernel(equation: Any, causal: bool) -> float:
    name = str(equation.params.get("name") or equation.primitive.name)
    products = next((n for prefix, n in KERNEL_PRODUCTS.items() if name.startswith(prefix)), None)
    if products is None:
        raise NotImplementedError(f"no formula for the FLOPs of the kernel {name!r}. Add one to KERNEL_PRODUCTS.")
    # The first floating-point arrays are the queries and the keys. Splash puts integer tables of its mask before them.
    arrays = [x.aval for x in equation.invars if x.aval.ndim >= 3 and jnp.issubdtype(x.aval.dtype, jnp.floating)]
    q, k = arrays[0].shape, arrays[1].shape
    if name.startswith("splash"):  # [..., N, T, H]
        *batch, T, H = q
        S = k[-2]
        products += name.startswith("splash_mha_dkv") and len(equation.outvars) > 4
    else:  # [B, T, N, H]
        B, T, N, H = q
        batch, S = (B, N), k[1]
    return products * 2.0 * math.prod(batch) * T * S * H * (0.5 if causal else 1.0)
