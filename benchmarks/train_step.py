"""Compares our training step with PyTorch's: Hugging Face's ImageGPT, and a plain GPT of the same shape.

    python benchmarks/train_step.py [--model 6x256x8] [--side 32] [--batch 4] [--only PATTERN] [--json FILE]

A step is forward, backward and Adam on a batch in memory. Candidates take turns, each in a process of its own, and
figures are medians. Without PyTorch, only ours are measured.

- FLOP/s are model FLOPs (`train_flops_per_image`, causal half), the same for all, over the time. Their share is of the
  fastest matrix product measured in the same run, and MFU is of the vendor's peak.
- On a CPU, ours also runs on one fake device per core, if the batch divides: small steps then use the cores better.
- On a GPU, only bfloat16 is run. With a single candidate (--only), its memory is compared with the compiler's plan. Set
  XLA_PYTHON_CLIENT_PREALLOCATE=false if PyTorch shares the GPU.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import exits
import jax
import jax.numpy as jnp
import numpy as np
from turns import Candidate, take_turns

from igpt_jax import storage
from igpt_jax.config import MODELS, MeshConfig, ModelConfig, OptimizerConfig, PretrainConfig
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding, topology
from igpt_jax.training.steps import abstract_state, init_state, jit_train_step

COLORS, RATE = 512, 1e-3


def device() -> tuple[str, str]:
    """JAX's platform and device. A child process asks, because JAX holds a GPU from its first use on."""
    if "BENCHMARK_DEVICE" not in os.environ:  # the candidates' processes inherit it
        script = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep=chr(10))"
        os.environ["BENCHMARK_DEVICE"] = subprocess.run([sys.executable, "-c", script], check=True, text=True,
                                                        stdout=subprocess.PIPE).stdout.strip()
    found, name = os.environ["BENCHMARK_DEVICE"].split("\n")
    return found, f"{platform.machine()}, {os.cpu_count()} cores" if found == "cpu" else name


PLATFORM, DEVICE = device()
ON_GPU = PLATFORM == "gpu"
PRODUCT = 8192 if ON_GPU else 2048  # side of the matrices whose product counts as the limit


def ours(shape: ModelConfig, side: int, batch: int, axis: str, precision: str, devices: int) -> Candidate:
    """Our training step, with its peak and planned memory as facts."""
    if not ON_GPU:
        jax.config.update("jax_num_cpu_devices", devices)
    tokens_BT = batch_of(side, batch)
    config = PretrainConfig(model=shape, batch_size=batch, precision=precision, steps=10**6,
                            optimizer=OptimizerConfig(learning_rate=RATE, warmup_steps=1),
                            mesh=MeshConfig(**{"data": 1, "fsdp": 1, axis: devices}))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    model = Model(config.model, COLORS, side, precision, mesh)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))
        state = jax.jit(lambda key: init_state(model, config, key), out_shardings=shardings)(key)
        tokens = jax.device_put(tokens_BT, sharding.batch_sharding(mesh))
        step = jit_train_step(model, config, mesh, 1).lower(state, tokens, key).compile()

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        state, measured = step(state, tokens, key)
        jax.block_until_ready((state, measured))
        return time.perf_counter() - start

    def facts() -> dict:
        memory, used = step.memory_analysis(), jax.devices()[0].memory_stats() or {}
        return {"peak_bytes": used.get("peak_bytes_in_use"),
                "planned_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
                + memory.output_size_in_bytes - memory.alias_size_in_bytes}

    return Candidate(seconds, facts=facts)


def batch_of(side: int, batch: int) -> np.ndarray:
    """Random tokens [B, T]."""
    return np.random.default_rng(0).integers(COLORS, size=(batch, side**2)).astype(np.int32)


def jax_product() -> Candidate:
    """The product of two square matrices."""
    # At random: on constant values chips are faster.
    factor = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT), "bfloat16" if ON_GPU else "float32")
    product = jax.jit(jnp.matmul)

    def seconds() -> float:
        start = time.perf_counter()
        product(factor, factor).block_until_ready()
        return time.perf_counter() - start

    return Candidate(seconds)


def candidates(shape: ModelConfig, side: int, batch: int, axis: str) -> dict[str, Callable[[], Candidate]]:
    """Functions that make the candidates, by name."""
    makers: dict[str, Callable[[], Candidate]] = {"jax's product": jax_product}
    for precision in ("bfloat16",) if ON_GPU else ("float32", "bfloat16"):
        for devices in (1,) if ON_GPU else sorted({1, math.gcd(batch, os.cpu_count())}):
            makers[f"ours, {precision}, {devices} device{'s' * (devices > 1)}"] = functools.partial(
                ours, shape, side, batch, axis, precision, devices)
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: measuring ours alone", file=sys.stderr)
        return makers
    import peers

    return makers | peers.candidates(shape, ON_GPU, PRODUCT, RATE, COLORS, batch_of(side, batch))


def shape_of(text: str, choices: dict[str, Any]) -> ModelConfig | None:
    """The model of a row of the model table, or of LAYERSxWIDTHxHEADS; None for other text."""
    if text in MODELS:
        return ModelConfig(text, **choices)
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
        layers, embed, heads = map(int, found.groups())
        return ModelConfig("igpt_tiny", layers=layers, embed=embed, heads=heads, **choices)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="6x256x8", help="a size of the model table, or layers x width x heads")
    parser.add_argument("--side", type=exits.count, default=32, help="height and width, pixels")
    parser.add_argument("--batch", type=exits.count, default=4)
    parser.add_argument("--attention", default="auto", help="our back-end")
    parser.add_argument("--remat", default="attention", help="our remat policy")
    parser.add_argument("--unroll", type=exits.count, default=1, help="blocks per iteration of our loop")
    parser.add_argument("--axis", default="data", choices=("data", "fsdp", "tensor"),
                        help="mesh axis that ours is split over if it has several devices")
    parser.add_argument("--rounds", type=exits.count, default=7)
    parser.add_argument("--only", type=exits.pattern, default="",
                        help="regular expression: only candidates whose names match")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    choices = {"attention": arguments.attention, "remat": arguments.remat, "unroll": arguments.unroll}
    if not (shape := shape_of(arguments.model, choices)):
        parser.error("--model is a row of the model table or LAYERSxWIDTHxHEADS")
    T = arguments.side**2
    flops = arguments.batch * train_flops_per_image(shape.layers, shape.embed, shape.mlp, COLORS, T)

    makers = candidates(shape, arguments.side, arguments.batch, arguments.axis)
    chosen = {name: make for name, make in makers.items() if arguments.only.search(name)}
    if not chosen:
        parser.error(f"--only={arguments.only.pattern!r} matches no candidate. They are: {'; '.join(makers)}.")
    seconds, facts = take_turns(chosen, arguments.rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    limits = {name: 2 * PRODUCT**3 / median for name, median in medians.items() if "product" in name}
    limit = max(limits.values(), default=None)
    chip = topology.chip_for(DEVICE)
    torch = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None
    figures = {"device": DEVICE, "load": os.getloadavg()[0], "jax": jax.__version__, "torch": torch,
               "model": arguments.model, "tokens": T, "batch": arguments.batch, **choices, "axis": arguments.axis,
               "product_flops": limits}
    figures["rows"] = [
        {"name": name, "seconds": median, "all_seconds": seconds[name], "flops": flops / median,
         "share_of_product": flops / median / limit if limit else None,
         "mfu": flops / median / chip.peak_bf16_flops if chip else None, **facts[name]}
        for name, median in medians.items() if name not in limits]

    figures["failed"] = sorted(chosen.keys() - seconds.keys())
    print(f"{figures['device']}, load {figures['load']:.1f}, jax {jax.__version__}, torch {torch}; "
          f"{arguments.model}, {T} tokens, batch {arguments.batch}" +
          "".join(f", {name} {each / 1e9:,.0f} GFLOP/s" for name, each in limits.items()))
    best = {peer: min((row["seconds"] for row in figures["rows"] if row["name"].startswith(peer)), default=None)
            for peer in ("Hugging Face", "plain GPT")}
    for row in figures["rows"]:
        cells = [f"{row['name']:42} {row['seconds'] * 1e3:9.1f} ms {row['flops'] / 1e9:10,.1f} GFLOP/s"]
        cells += [f"{row['share_of_product']:4.0%}"] if limit else []
        cells += [f"MFU {row['mfu']:.1%}"] if chip else []
        cells += [f"{best[peer] / row['seconds']:5.2f} x {peer}'s best" for peer in best if best[peer]]
        print(" ".join(cells))
        if row.get("peak_bytes"):
            print(f"    memory: {row['peak_bytes'] / 2**30:.2f} GiB, {row['planned_bytes'] / 2**30:.2f} planned")
    if arguments.json:
        storage.publish(storage.path(arguments.json), json.dumps(figures, indent=1) + "\n")
    return int(len(seconds) < len(chosen))


if __name__ == "__main__":
    exits.run(main)
