"""Compares attention back-ends with jax.nn.dot_product_attention, forward and forward + backward.

    python benchmarks/attention.py [--shape 4,1024,8,32 ...] [--dtype float32] [--rounds 15] [--json FILE]

Each round runs every candidate once, on GPUs 20 times, so that a noisy machine is noisy for all. Prints medians, the
ratio to XLA's attention, and the error of the results: |result - reference| / |reference|, where the reference computes
in float32. The row `reference` shows the error that the dtype alone causes.
"""

import argparse
import functools
import json
import statistics
import time

import exits
import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import storage
from igpt_jax.config import ATTENTION_BACKENDS, UserError
from igpt_jax.model.attention import attention, backend_for

XLA = "jax.nn.dot_product_attention"


def candidates(platform: str, dtype: str, tokens: int, head_dim: int) -> dict:
    """Causal attention(q, k, v) by name: XLA's, and those of our back-ends that run here."""
    found = {XLA: functools.partial(jax.nn.dot_product_attention, scale=1.0, is_causal=True, implementation="xla")}
    for name in ATTENTION_BACKENDS[1:]:
        if name == "blocked" and platform != "cpu":  # made for CPUs; GPUs compile it for minutes
            continue
        try:
            backend_for(name, platform, dtype, tokens, head_dim)
        except UserError:
            continue
        found[name] = functools.partial(attention, causal=True, backend=name)
    return found


def forward_backward(attend):
    """Makes a function (q, k, v, weight) -> gradients of the weighted sum of the result."""
    return jax.grad(lambda q, k, v, weight: (attend(q, k, v) * weight).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def error(found, expected) -> float:
    """The largest norm of a difference, as a share of the expected array's norm, over the arrays of both."""
    def share(one: jax.Array, other: jax.Array) -> float:
        other = np.asarray(other)
        return float(np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other))

    return max(jax.tree.leaves(jax.tree.map(share, found, expected)))


def measure(shape: tuple[int, ...], dtype: str, rounds: int) -> list[dict]:
    """Prints and returns the rows of one shape (B, T, N, H)."""
    q, k, v, weight = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    *qkv, weight = (x.astype(dtype) for x in (q * shape[3] ** -0.5, k, v, weight))
    found = candidates(jax.default_backend(), dtype, shape[1], shape[3])
    whats = {"forward": (lambda attend: attend, qkv), "forward + backward": (forward_backward, [*qkv, weight])}
    runs, errors = {}, {}
    for what, (made_of, given) in whats.items():
        exact = functools.partial(attention, causal=True, backend="reference")
        with jax.default_matmul_precision("highest"):  # GPUs multiply float32 in TF32 otherwise
            expected = jax.jit(made_of(exact))(*(each.astype(jnp.float32) for each in given))
        for name, attend in found.items():
            runs[name, what] = jax.jit(made_of(attend)), given
            errors[name, what] = error(runs[name, what][0](*given), expected)  # compiles
    seconds = {which: [] for which in runs}
    repeats = 1 if jax.default_backend() == "cpu" else 20  # a launch takes as long as a small kernel
    for _ in range(rounds):
        for which, (run, given) in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = run(*given)
            jax.block_until_ready(result)
            seconds[which].append((time.perf_counter() - start) / repeats)
    medians = {which: statistics.median(each) for which, each in seconds.items()}
    print(f"(B, T, N, H) = {shape}")
    rows = []
    for (name, what), median in medians.items():
        ratio = medians[XLA, what] / median
        rows.append({"shape": "x".join(map(str, shape)), "attention": name, "what": what, "seconds": median,
                     "times_faster_than_xla": ratio, "error": errors[name, what]})
        print(f"{name:30} {what:20} {median * 1e3:10.2f} ms {ratio:8.2f} x   error {errors[name, what]:.1e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", type=exits.counts, default=[(4, 1024, 8, 32)], help="B,T,N,H")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=exits.count, default=15)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if any(len(shape) != 4 for shape in arguments.shape):
        parser.error("--shape must be B,T,N,H, such as 4,1024,8,32")
    kind = jax.devices()[0].device_kind
    print(f"{kind}, {arguments.dtype}, jax {jax.__version__}, median of {arguments.rounds}")
    rows = []
    for shape in arguments.shape:
        rows += measure(shape, arguments.dtype, arguments.rounds)
        if arguments.json:  # after each shape, since a queue may end it
            storage.publish(storage.path(arguments.json), json.dumps(
                {"device": kind, "jax": jax.__version__, "dtype": arguments.dtype, "rows": rows}, indent=1))


if __name__ == "__main__":
    exits.run(main)
