"""Measures sampling against the memory bandwidth, and against transformers' `generate`, in one run.

    python benchmarks/sampling.py [--size igpt_s] [--side 16] [--batch 8] [--precision float32] [--cache float32]
        [--rounds 3] [--theirs 32] [--json FILE]

A step must read all weights (blocks and head, in the compute dtype) and the keys and values of the pixels so far
(2 x layers x batch x width x pixels, in the cache's dtype). The share of the bandwidth is those bytes / time /
bandwidth. The bandwidth is that of a sum over 1 GiB of float32 (8 on a GPU), measured between the rounds.

--theirs limits how many pixels of each image transformers draws (0: none). Its later steps only take longer.

Then it measures one step with the cache of each segment, at 1,024 and 4,096 pixels (--lengths).
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import exits
import jax
import jax.numpy as jnp

from igpt_jax import storage
from igpt_jax.config import ModelConfig
from igpt_jax.model import sampling
from igpt_jax.model.dims import Dims
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate
from igpt_jax.runtime.precision import set_precision

COLORS = 512
STEPS = 32  # consecutive steps that are timed together


def bandwidth(array: jax.Array, read: Callable) -> float:
    """Bytes per second of a sum over `array`."""
    start = time.perf_counter()
    read(array).block_until_ready()
    return array.nbytes / (time.perf_counter() - start)


def step_bytes(d: Dims, batch: int, pixels: float, weight_bytes: int, cache_bytes: int) -> float:
    """Bytes that a step must read with `pixels` pixels cached."""
    weights = d.L * (4 * d.D**2 + 2 * d.D * d.F) + d.V * d.D
    return weights * weight_bytes + 2 * d.L * batch * d.D * pixels * cache_bytes


def ours(model: Model, params: dict, batch: int, cache: str) -> Callable:
    """() -> seconds of one batch of whole images."""
    given, keys = jnp.zeros((batch, 0), jnp.int32), jax.random.split(jax.random.key(1), batch)
    run = jax.jit(generate, static_argnums=(0, 4, 5)).lower(model, params, given, keys, Sampling(), cache).compile()

    def seconds() -> float:
        start = time.perf_counter()
        run(params, given, keys).block_until_ready()
        return time.perf_counter() - start

    return seconds


def theirs(d: Dims, batch: int, pixels: int, precision: str) -> Callable:
    """() -> seconds of transformers' `generate` for `pixels` pixels of as many images, on the same device."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.ImageGPTConfig(vocab_size=d.V + 1, n_positions=d.T, n_embd=d.D, n_layer=d.L, n_head=d.N)
    model = transformers.ImageGPTForCausalImageModeling(config).eval().to(device, getattr(torch, precision))
    start_B1 = torch.full((batch, 1), d.V, device=device)

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(input_ids=start_B1, max_new_tokens=pixels, min_new_tokens=pixels, do_sample=True,
                                  top_k=0, pad_token_id=0)
        made.cpu()
        assert made.shape == (batch, pixels + 1)
        return time.perf_counter() - start

    return seconds


def step_cost(model: Model, params: dict, batch: int, cached: int, cache: str) -> float:
    """Median seconds of a step with a cache of `cached` positions, all filled."""
    d = model.dims

    def run(params):
        gpt = model.bind(params)
        blocks = sampling.unstacked(gpt)

        def step(i, carry):
            logits_BV, caches = sampling.decode_pixel(gpt, blocks, carry[0], cached - STEPS + i, carry[1])
            return jnp.argmax(logits_BV, -1).astype(jnp.int32), caches

        caches = [(jnp.zeros((batch, d.N, cached, d.H), cache),) * 2 for _ in range(d.L)]
        return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(batch, jnp.int32), caches))[0]

    compiled = jax.jit(run).lower(params).compile()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        compiled(params).block_until_ready()
        times.append((time.perf_counter() - start) / STEPS)
    return statistics.median(times)


def make_model(size: str, side: int, precision: str) -> tuple[Model, dict]:
    model = Model(ModelConfig(size), COLORS, side, precision)
    return model, jax.jit(model.init)(jax.random.key(0))


def whole_images(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Measures and prints the speed of whole images, ours and transformers'."""
    batch = options.batch
    model, params = make_model(options.size, options.side, options.precision)
    d = model.dims
    array, read = jnp.ones(2**28 if jax.default_backend() == "cpu" else 2**31, jnp.float32), jax.jit(jnp.sum)
    bandwidth(array, read)  # compiles
    run = ours(model, params, batch, cache)
    installed = all(map(importlib.util.find_spec, ("torch", "transformers")))
    if options.theirs and not installed:
        print("PyTorch or transformers is not installed: measuring ours alone", file=sys.stderr)
    their_run = installed and options.theirs and theirs(d, batch, options.theirs, options.precision)
    speeds, seconds, their_seconds = [], [], []
    for _ in range(options.rounds):  # in turns, so that a noisy machine is noisy for all
        speeds.append(bandwidth(array, read))
        seconds.append(run())
        speeds.append(bandwidth(array, read))
        if their_run:
            try:
                their_seconds.append(their_run())
            except Exception:  # ours is still of use
                traceback.print_exc()
                their_run = None
    median, speed = statistics.median(seconds), statistics.median(speeds)
    weight_bytes, cache_bytes = (jnp.dtype(dtype).itemsize for dtype in (options.precision, cache))
    reached = step_bytes(d, batch, d.T / 2, weight_bytes, cache_bytes) * d.T / median
    figures = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "size": options.size, "pixels": d.T,
               "batch": batch, "precision": options.precision, "cache": cache, "bandwidth": speed, "seconds": median,
               "pixels_per_second": batch * d.T / median, "images_per_second": batch / median,
               "bytes_per_second": reached, "share_of_bandwidth": reached / speed}
    print(f"{figures['device']}, {options.size}, {d.T} pixels, batch {batch}, {options.precision}, cache {cache}, "
          f"jax {jax.__version__}, median of {options.rounds}")
    print(f"memory: {speed / 1e9:.1f} GB/s read ({', '.join(f'{each / 1e9:.1f}' for each in speeds)})")
    print(f"ours:   {median:.2f} s, {figures['pixels_per_second']:.1f} pixels/s, {figures['images_per_second']:.3g} "
          f"images/s; {reached / 1e9:.2f} GB/s, {figures['share_of_bandwidth']:.0%} of memory's")
    if their_seconds:
        figures["transformers_pixels_per_second"] = batch * options.theirs / statistics.median(their_seconds)
        figures["times_faster"] = figures["pixels_per_second"] / figures["transformers_pixels_per_second"]
        print(f"transformers generate, the first {options.theirs} pixels: "
              f"{figures['transformers_pixels_per_second']:.1f} pixels/s; ours is {figures['times_faster']:.1f} x")
    return figures


def single_steps(options: argparse.Namespace, cache: str) -> list[dict[str, float]]:
    """Measures and prints the cost of a step with the cache of each segment."""
    weight_bytes, cache_bytes = (jnp.dtype(dtype).itemsize for dtype in (options.precision, cache))
    rows = []
    for pixels in options.lengths:
        model, params = make_model(options.size, round(pixels ** 0.5), options.precision)
        for end in sampling.segments(0, pixels):
            cost = step_cost(model, params, options.lengths_batch, end + 1, cache)
            gigabytes = step_bytes(model.dims, options.lengths_batch, end + 1, weight_bytes, cache_bytes) / 1e9
            rows.append({"pixels": pixels, "cached": end + 1, "seconds": cost, "gigabytes": gigabytes})
            print(f"{pixels:5} pixels, batch {options.lengths_batch}, {end + 1:5} cached: {cost * 1e3:7.1f} ms per "
                  f"step, {gigabytes:.2f} GB, {gigabytes / cost:.1f} GB/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="igpt_s", help="row of the model table")
    parser.add_argument("--side", type=exits.count, default=16, help="height and width, pixels")
    parser.add_argument("--batch", type=exits.count, default=8)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cache", default="", choices=["", "float32", "bfloat16"],
                        help="dtype of the cache; empty: as `sample` chooses it")
    parser.add_argument("--rounds", type=exits.count, default=3)
    parser.add_argument("--theirs", type=int, default=32, help="pixels that transformers draws; 0: leave it out")
    parser.add_argument("--lengths", type=exits.counts, default="1024,4096",
                        help="pixels of an image, for the cost of a step")
    parser.add_argument("--lengths_batch", type=exits.count, default=2)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    set_precision(options.precision)
    cache = options.cache or jnp.dtype(make_model("igpt_tiny", 4, options.precision)[0].cache_dtype).name
    figures = {**whole_images(options, cache), "steps": single_steps(options, cache)}
    if options.json:
        storage.publish(storage.path(options.json), json.dumps(figures, indent=1))


if __name__ == "__main__":
    exits.run(main)
