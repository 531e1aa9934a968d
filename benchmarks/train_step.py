"""A training step of ours beside PyTorch's: Hugging Face's ImageGPT, and a plain GPT of the same shape, at their best.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/train_step.py \
        [--shape 6x256x8] [--side 32] [--batch 4] [--rounds 7] [--json FILE]

A step is forward, backward and Adam on a batch already in memory. All candidates take turns in one process, so that a
noisy machine is noisy for all; figures are medians. FLOP/s are model FLOPs (causal half, `train_flops_per_image`), the
same for all, over the time, and their share of the fastest float32 matrix product measured in the same run. With
several JAX devices ours also runs split over them: two fake devices use two cores better than one with two threads.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from igpt_jax import sharding, steps, telemetry
from igpt_jax.config import MeshConfig, ModelConfig, OptimizerConfig, PretrainConfig
from igpt_jax.model import Model

COLOURS, RATE = 512, 1e-3
PRODUCT = 2048  # side of the matrices whose product is the limit


def ours(shape: ModelConfig, side: int, tokens_BT: np.ndarray, precision: str, devices: int) -> Callable[[], float]:
    """() -> seconds of a step."""
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

    return seconds


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


def theirs(model: nn.Module, tokens_BT: np.ndarray, bfloat16: bool, compiled: bool) -> Callable[[], float]:
    """() -> seconds of a step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    wanted = torch.tensor(tokens_BT, dtype=torch.long)
    given = torch.cat([torch.full((len(wanted), 1), COLOURS), wanted[:, :-1]], 1)

    def loss_of(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits_BTV = model(given)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), wanted.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def seconds() -> float:
        start = time.perf_counter()
        loss_of(given, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return seconds


def products() -> dict[str, Callable[[], float]]:
    """name -> () -> seconds of a product of two square matrices."""
    one = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    product, torch_one = jax.jit(jnp.matmul), torch.ones(PRODUCT, PRODUCT)

    def timed(run: Callable) -> Callable[[], float]:
        def seconds() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        return seconds

    return {"float32 product, jax": timed(lambda: product(one, one).block_until_ready()),
            "float32 product, torch": timed(lambda: torch_one @ torch_one)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="6x256x8", help="layers x width x heads")
    parser.add_argument("--side", type=int, default=32, help="height and width, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only candidates whose name holds this text, and the products")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    layers, embed, heads = map(int, arguments.shape.split("x"))
    shape = ModelConfig("igpt_tiny", layers=layers, embed=embed, heads=heads, remat="none")
    T = arguments.side**2
    tokens_BT = np.random.default_rng(0).integers(COLOURS, size=(arguments.batch, T)).astype(np.int32)
    flops = arguments.batch * telemetry.train_flops_per_image(layers, embed, 4 * embed, COLOURS, T)

    makers: dict[str, Callable[[], Callable[[], float]]] = {}
    for precision in ("float32", "bfloat16"):
        for devices in {1, len(jax.devices())}:
            makers[f"ours, {precision}, {devices} device{'s' * (devices > 1)}"] = (
                lambda precision=precision, devices=devices: ours(shape, arguments.side, tokens_BT, precision, devices))
    for name, make in (("Hugging Face", lambda: hugging_face(shape, T)),
                       ("plain GPT", lambda: PlainGPT(layers, embed, heads, T))):
        for bfloat16 in (False, True):
            for compiled in (False, True):
                kind = f"{'bfloat16 autocast' if bfloat16 else 'float32'}, {'compiled' if compiled else 'eager'}"
                makers[f"{name}, {kind}"] = (lambda make=make, bfloat16=bfloat16, compiled=compiled:
                                             theirs(make(), tokens_BT, bfloat16, compiled))
    runs = products() | {name: make() for name, make in makers.items() if arguments.only in name}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(arguments.rounds + 2):  # the first two compile and warm up
        for name, run in runs.items():
            spent = run()
            if round_ > 1:
                seconds[name].append(spent)

    medians = {name: statistics.median(each) for name, each in seconds.items()}
    limits = {name: 2 * PRODUCT**3 / median for name, median in medians.items() if "product" in name}
    peak = max(limits.values())
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}, torch {torch.__version__}; "
          f"{arguments.shape}, {T} tokens, batch {arguments.batch}; " +
          ", ".join(f"{name} {limit / 1e9:.0f} GFLOP/s" for name, limit in limits.items()))
    rows = [{"name": name, "seconds": median, "all_seconds": seconds[name], "gflops": flops / median / 1e9,
             "share_of_product": flops / median / peak} for name, median in medians.items() if name not in limits]
    peers = [row["seconds"] for row in rows if row["name"].startswith("Hugging Face")]
    for row in rows:
        ratio = f"{min(peers) / row['seconds']:6.2f} x Hugging Face's best" if peers else ""
        print(f"{row['name']:40} {row['seconds'] * 1e3:9.0f} ms {row['gflops']:7.1f} GFLOP/s "
              f"{row['share_of_product']:5.0%} {ratio}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(
            {"cores": os.cpu_count(), "jax": jax.__version__, "torch": torch.__version__, "shape": arguments.shape,
             "tokens": T, "batch": arguments.batch, "product_flops": limits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
