"""Compares attention back-ends with jax.nn.dot_product_attention, forward and forward + backward.

    python benchmarks/attention.py [--shape 4,1024,8,32] [--dtype float32] [--rounds 15] [--json FILE]

Each round runs every candidate once, so that a noisy machine is noisy for all. Prints medians, the ratio to XLA's
attention and the largest difference from the reference's values.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.config import ATTENTION_BACKENDS, UserError
from igpt_jax.model.attention import attention, backend_for

XLA = "jax.nn.dot_product_attention"


def candidates(platform: str, dtype: str, tokens: int, head_dim: int) -> dict:
    """Causal attention(q, k, v) by name: XLA's, and those of our back-ends that run here."""
    found = {XLA: functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")}
    for name in ATTENTION_BACKENDS[1:]:
        try:
            backend_for(name, platform, dtype, tokens, head_dim)
        except UserError:
            continue
        found[name] = functools.partial(attention, causal=True, backend=name)
    return found


def forward_backward(attend):
    """Makes a function (q, k, v, weight) -> gradients of the weighted sum of the result."""
    return jax.grad(lambda q, k, v, weight: (attend(q, k, v) * weight).sum().astype(jnp.float32), argnums=(0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4,1024,8,32", help="B,T,N,H")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    shape = tuple(map(int, arguments.shape.split(",")))
    *qkv, weight = (jax.random.normal(jax.random.key(i), shape).astype(arguments.dtype) for i in range(4))
    device = jax.devices()[0]

    found = candidates(device.platform, arguments.dtype, shape[1], shape[3])
    runs = {(name, "forward"): (jax.jit(each), qkv) for name, each in found.items()}
    runs |= {(name, "forward + backward"): (jax.jit(forward_backward(each)), [*qkv, weight])
             for name, each in found.items()}
    expected = np.asarray(attention(*qkv, causal=True, backend="reference"), np.float32)
    differences = {name: float(np.abs(np.asarray(runs[name, "forward"][0](*qkv), np.float32) - expected).max())
                   for name in found}
    seconds = {which: [] for which in runs}
    for round_ in range(arguments.rounds + 1):  # the first compiles
        for which, (run, given) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*given))
            if round_:
                seconds[which].append(time.perf_counter() - start)

    medians = {which: statistics.median(each) for which, each in seconds.items()}
    print(f"{device.device_kind}, {arguments.dtype}, (B, T, N, H) = {shape}, jax {jax.__version__}, "
          f"median of {arguments.rounds}")
    rows = []
    for (name, what), median in medians.items():
        ratio = medians[XLA, what] / median
        rows.append({"attention": name, "what": what, "seconds": median, "times_faster_than_xla": ratio,
                     "largest_difference": differences[name]})
        print(f"{name:30} {what:20} {median * 1e3:10.2f} ms {ratio:8.2f} x   differs by {differences[name]:.1e}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(
            {"device": device.device_kind, "jax": jax.__version__, "shape": shape, "dtype": arguments.dtype,
             "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
