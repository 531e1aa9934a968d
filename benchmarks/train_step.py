"""A training step of ours beside PyTorch's: Hugging Face's ImageGPT, and a plain GPT of the same shape, at their best.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/train_step.py \
        [--model 6x256x8] [--side 32] [--batch 4] [--only PATTERN] [--rounds 7] [--json FILE]

A step is forward, backward and Adam on a batch already in memory. All candidates take turns in one process, so that a
noisy machine is noisy for all; figures are medians. FLOP/s are model FLOPs (causal half, `train_flops_per_image`), the
same for all, over the time; their share is of the fastest matrix product measured in the same run, and MFU of the peak
that the maker states. With several JAX devices ours also runs split over them: on a CPU two fake devices use two cores
better than one with two threads. On a GPU bfloat16 alone is run, and the memory of one of ours alone (--only) is held
against what its compiler planned; start it with XLA_PYTHON_CLIENT_PREALLOCATE=false where PyTorch runs beside it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from igpt_jax import sharding, steps, telemetry, topology
from igpt_jax.config import MODELS, MeshConfig, ModelConfig, OptimizerConfig, PretrainConfig
from igpt_jax.model import Model

COLOURS, RATE = 512, 1e-3
ON_GPU = jax.default_backend() == "gpu"
TORCH_DEVICE = "cuda" if ON_GPU else "cpu"
PRODUCT = 8192 if ON_GPU else 2048  # side of the matrices whose product is the limit


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What takes its turn: `seconds()` of one step; bytes of device memory that its compiler planned, where known."""
    seconds: Callable[[], float]
    planned_bytes: int | None = None


def ours(shape: ModelConfig, side: int, tokens_BT: np.ndarray, precision: str, devices: int) -> Candidate:
    config = PretrainConfig(model=shape, batch_size=len(tokens_BT), precision=precision, steps=10**6,
                            optimizer=OptimizerConfig(learning_rate=RATE, warmup_steps=1),
                            mesh=MeshConfig(data=devices, fsdp=1))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    model = Model(config.model, COLOURS, side, precision, mesh)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract_state(model, config, mesh))
        state = jax.jit(lambda key: steps.init_state(model, config, key), out_shardings=places)(key)
        tokens = jax.device_put(tokens_BT, sharding.batch_sharding(mesh))
        step = steps.jit_train_step(model, config, mesh, 1).lower(state, tokens, key).compile()

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        state, measured = step(state, tokens, key)
        jax.block_until_ready((state, measured))
        return time.perf_counter() - start

    memory = step.memory_analysis()
    return Candidate(seconds, memory.argument_size_in_bytes + memory.temp_size_in_bytes
                     + memory.output_size_in_bytes - memory.alias_size_in_bytes)


class PlainGPT(nn.Module):
    """What a good PyTorch GPT looks like: joined projections, scaled_dot_product_attention, no dropout, no biases."""

    def __init__(self, layers: int, embed: int, heads: int, tokens: int):
        super().__init__()
        self.colours, self.places = nn.Embedding(COLOURS + 1, embed), nn.Embedding(tokens, embed)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(embed, bias=False), "qkv": nn.Linear(embed, 3 * embed, bias=False),
            "out": nn.Linear(embed, embed, bias=False), "norm2": nn.LayerNorm(embed, bias=False),
            "up": nn.Linear(embed, 4 * embed, bias=False), "down": nn.Linear(4 * embed, embed, bias=False),
        }) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(embed, bias=False), nn.Linear(embed, COLOURS, bias=False)
        self.heads = heads

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        x = self.colours(x_BT) + self.places.weight
        B, T, D = x.shape
        for block in self.blocks:
            q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2)
                       for part in block["qkv"](block["norm1"](x)).split(D, dim=2))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](attended.transpose(1, 2).reshape(B, T, D))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x)), approximate="tanh"))
        return self.head(self.norm(x))


def hugging_face(shape: ModelConfig, tokens: int) -> nn.Module:
    """transformers' ImageGPT, from indices to logits of the palette's colours."""
    import transformers

    config = transformers.ImageGPTConfig(vocab_size=COLOURS + 1, n_positions=tokens, n_embd=shape.embed,
                                         n_layer=shape.layers, n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0,
                                         attn_pdrop=0.0, use_cache=False)
    model = transformers.ImageGPTForCausalImageModeling(config)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=x_BT).logits

    return Logits()


def theirs(model: nn.Module, tokens_BT: np.ndarray, bfloat16: bool, compiled: bool) -> Candidate:
    model = model.to(TORCH_DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    wanted = torch.tensor(tokens_BT, dtype=torch.long, device=TORCH_DEVICE)
    given = F.pad(wanted[:, :-1], (1, 0), value=COLOURS)

    def loss_of(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.autocast(TORCH_DEVICE, torch.bfloat16, enabled=bfloat16):
            logits_BTV = model(given)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), wanted.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def seconds() -> float:
        start = time.perf_counter()
        loss_of(given, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return Candidate(seconds)


def products() -> dict[str, Candidate]:
    """Products of two square matrices by each framework, by name."""
    dtype = "bfloat16" if ON_GPU else "float32"
    one, torch_one = jnp.ones((PRODUCT, PRODUCT), dtype), torch.ones(PRODUCT, PRODUCT, dtype=getattr(torch, dtype))
    product, torch_one = jax.jit(jnp.matmul), torch_one.to(TORCH_DEVICE)

    def torch_product() -> None:
        torch_one @ torch_one
        if ON_GPU:
            torch.cuda.synchronize()

    def timed(run: Callable) -> Candidate:
        def seconds() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        return Candidate(seconds)

    return {f"{dtype} product, jax": timed(lambda: product(one, one).block_until_ready()),
            f"{dtype} product, torch": timed(torch_product)}


def candidates(shape: ModelConfig, side: int, tokens_BT: np.ndarray) -> dict[str, Callable[[], Candidate]]:
    """What makes each, by name."""
    makers: dict[str, Callable[[], Candidate]] = {}
    for precision in ("bfloat16",) if ON_GPU else ("float32", "bfloat16"):
        for devices in sorted({1, len(jax.devices())}):
            makers[f"ours, {precision}, {devices} device{'s' * (devices > 1)}"] = (
                lambda precision=precision, devices=devices: ours(shape, side, tokens_BT, precision, devices))
    for name, make in (("Hugging Face", lambda: hugging_face(shape, side**2)),
                       ("plain GPT", lambda: PlainGPT(shape.layers, shape.embed, shape.heads, side**2))):
        for bfloat16 in (True,) if ON_GPU else (False, True):
            for compiled in (False, True):
                kind = f"{'bfloat16 autocast' if bfloat16 else 'float32'}, {'compiled' if compiled else 'eager'}"
                makers[f"{name}, {kind}"] = (lambda make=make, bfloat16=bfloat16, compiled=compiled:
                                             theirs(make(), tokens_BT, bfloat16, compiled))
    return makers


def measure(runs: dict[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by name; the first two rounds compile and warm up, and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            spent = run.seconds()
            if round_ > 1:
                seconds[name].append(spent)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="6x256x8", help="a size of the model table, or layers x width x heads")
    parser.add_argument("--side", type=int, default=32, help="height and width, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--attention", default="auto", help="our back-end")
    parser.add_argument("--remat", default="attention", help="what ours computes again")
    parser.add_argument("--unroll", type=int, default=1, help="blocks in each turn of our loop; their number: no loop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="candidates whose names match this regular expression")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    choices = {"attention": arguments.attention, "remat": arguments.remat, "unroll": arguments.unroll}
    if arguments.model in MODELS:
        shape = ModelConfig(arguments.model, **choices)
    else:
        layers, embed, heads = map(int, arguments.model.split("x"))
        shape = ModelConfig("igpt_tiny", layers=layers, embed=embed, heads=heads, **choices)
    T = arguments.side**2
    tokens_BT = np.random.default_rng(0).integers(COLOURS, size=(arguments.batch, T)).astype(np.int32)
    flops = arguments.batch * telemetry.train_flops_per_image(shape.layers, shape.embed, shape.mlp, COLOURS, T)

    makers = {name: make for name, make in candidates(shape, arguments.side, tokens_BT).items()
              if re.search(arguments.only, name)}
    runs = products() | {name: make() for name, make in makers.items()}
    seconds = measure(runs, arguments.rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    limits = {name: 2 * PRODUCT**3 / median for name, median in medians.items() if "product" in name}
    device = jax.devices()[0]
    chip, used = topology.chip_for(device.device_kind), device.memory_stats() or {}
    figures = {"device": f"{platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else
               device.device_kind, "load": os.getloadavg()[0], "jax": jax.__version__, "torch": torch.__version__,
               "model": arguments.model, "tokens": T, "batch": arguments.batch, **choices, "product_flops": limits,
               "peak_bytes": used.get("peak_bytes_in_use")}
    figures["rows"] = [
        {"name": name, "seconds": median, "all_seconds": seconds[name], "flops": flops / median,
         "share_of_product": flops / median / max(limits.values()),
         "mfu": flops / median / chip.peak_bf16_flops if chip else None, "planned_bytes": runs[name].planned_bytes}
        for name, median in medians.items() if name not in limits]

    print(f"{figures['device']}, load {figures['load']:.1f}, jax {jax.__version__}, torch {torch.__version__}; "
          f"{arguments.model}, {T} tokens, batch {arguments.batch}; " +
          ", ".join(f"{name} {limit / 1e9:,.0f} GFLOP/s" for name, limit in limits.items()))
    best = {peer: min((row["seconds"] for row in figures["rows"] if row["name"].startswith(peer)), default=None)
            for peer in ("Hugging Face", "plain GPT")}
    for row in figures["rows"]:
        ratios = ", ".join(f"{best[peer] / row['seconds']:5.2f} x {peer}'s best" for peer in best if best[peer])
        mfu = f"MFU {row['mfu']:.1%} " if chip else ""
        print(f"{row['name']:42} {row['seconds'] * 1e3:9.1f} ms {row['flops'] / 1e9:10,.1f} GFLOP/s "
              f"{row['share_of_product']:4.0%} {mfu}{ratios}")
    if figures["peak_bytes"]:
        planned = max(row["planned_bytes"] or 0 for row in figures["rows"])
        print(f"memory: {figures['peak_bytes'] / 2**30:.2f} GiB at most, {planned / 2**30:.2f} planned")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
