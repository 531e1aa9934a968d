"""FLOPs of a program, counted in its jaxpr.

XLA's `cost_analysis` counts the body of a scan once and a kernel as nothing. Only matrix products count here, as
everywhere in the field: 2 x the product of all dims.
"""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

# Matrix products of [T, S] x [H] (or their like) in each attention kernel. Forward: q k, and weights x v. The backward
# kernels compute the scores again; splash computes them in both of its own.
KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,  # its name goes on after this; so does that of the next ones
    "splash_mha_dkv": 4,  # scores, dv, d weights, dk
    "splash_mha_dq": 3,  # scores, d weights, dq
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,  # scores, dv, d weights, dq, dk
}


def count(jaxpr: Any, causal: bool = True) -> float:
    """FLOPs of a closed jaxpr over all devices, with each kernel counted by its formula.

    What nothing uses does not count: remat's backward pass names the forward kernels again, and XLA drops them too.

    Args:
      jaxpr: of `jax.make_jaxpr`.
      causal: attention kernels skip what the mask leaves empty, half of it. (Other code counts as it is written: the
        plain reference computes all scores.)

    Raises:
      NotImplementedError: a kernel without formula.
    """
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
        raise NotImplementedError("a while loop holds matrix products: its length is not known before it runs")
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}.get(name, lambda: 1)()
    return times * sum(bodies)


def _bodies(params: dict[str, Any]) -> list[Any]:
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    return [value for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
            if isinstance(value, kinds)]


def _of_kernel(equation: Any, causal: bool) -> float:
    name = str(equation.params.get("name") or equation.primitive.name)
    products = next((n for prefix, n in KERNEL_PRODUCTS.items() if name.startswith(prefix)), None)
    if products is None:
        raise NotImplementedError(f"no formula for the FLOPs of the kernel {name!r}")
    # The first arrays of numbers are the queries and the keys; splash has tables of the mask before them.
    arrays = [x.aval for x in equation.invars if x.aval.ndim >= 3 and jnp.issubdtype(x.aval.dtype, jnp.floating)]
    q, k = arrays[0].shape, arrays[1].shape
    if name.startswith("splash"):  # [..., N, T, H]
        *batch, T, H = q
        S = k[-2]
    else:  # [B, T, N, H]
        B, T, N, H = q
        batch, S = (B, N), k[1]
    return products * 2.0 * math.prod(batch) * T * S * H * (0.5 if causal else 1.0)
