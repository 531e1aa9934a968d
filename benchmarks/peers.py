"""PyTorch candidates of train_step.py: Hugging Face's ImageGPT, a plain GPT of the same shape, a matrix product."""

import functools
import importlib.util
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from turns import Candidate

from igpt_jax.config import ModelConfig


def device_for(on_gpu: bool) -> str:
    """PyTorch's name for the device that JAX uses. Raises RuntimeError if PyTorch uses another one."""
    if on_gpu != torch.cuda.is_available():
        raise RuntimeError(f"JAX runs on the {'GPU' if on_gpu else 'CPU'} and PyTorch does not. Install both for the "
                           "same device.")
    return "cuda" if on_gpu else "cpu"


class PlainGPT(nn.Module):
    """A fast PyTorch GPT: joined projections, scaled_dot_product_attention, no dropout, no biases."""

    def __init__(self, layers: int, embed: int, heads: int, tokens: int, colors: int):
        super().__init__()
        self.colors, self.positions = nn.Embedding(colors + 1, embed), nn.Embedding(tokens, embed)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(embed, bias=False), "qkv": nn.Linear(embed, 3 * embed, bias=False),
            "out": nn.Linear(embed, embed, bias=False), "norm2": nn.LayerNorm(embed, bias=False),
            "up": nn.Linear(embed, 4 * embed, bias=False), "down": nn.Linear(4 * embed, embed, bias=False),
        }) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(embed, bias=False), nn.Linear(embed, colors, bias=False)
        self.heads = heads

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        x = self.colors(x_BT) + self.positions.weight
        B, T, D = x.shape
        for block in self.blocks:
            q, k, v = (each.view(B, T, self.heads, -1).transpose(1, 2)
                       for each in block["qkv"](block["norm1"](x)).split(D, dim=2))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](attended.transpose(1, 2).reshape(B, T, D))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x)), approximate="tanh"))
        return self.head(self.norm(x))


def hugging_face(shape: ModelConfig, tokens: int, colors: int) -> nn.Module:
    """transformers' ImageGPT, from indices to logits of the palette's colors."""
    import transformers

    config = transformers.ImageGPTConfig(vocab_size=colors + 1, n_positions=tokens, n_embd=shape.embed,
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


def step(make: Callable[[], nn.Module], on_gpu: bool, rate: float, colors: int, tokens_BT: np.ndarray, bfloat16: bool,
         compiled: bool) -> Candidate:
    """A training step: forward, backward and Adam."""
    device = device_for(on_gpu)
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    wanted = torch.tensor(tokens_BT, dtype=torch.long, device=device)
    given = F.pad(wanted[:, :-1], (1, 0), value=colors)

    def loss_of(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            logits_BTV = model(given)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), wanted.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def seconds() -> float:
        start = time.perf_counter()
        loss_of(given, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return Candidate(seconds, rest=torch.cuda.empty_cache)


def product(on_gpu: bool, side: int) -> Candidate:
    """The product of two square matrices."""
    # At random: on constant values chips are faster.
    factor = torch.randn(side, side, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device_for(on_gpu))

    def seconds() -> float:
        start = time.perf_counter()
        torch.matmul(factor, factor)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return Candidate(seconds)


def candidates(shape: ModelConfig, on_gpu: bool, side: int, rate: float, colors: int, tokens_BT: np.ndarray
               ) -> dict[str, Callable[[], Candidate]]:
    """Functions that make the candidates, by name; `side` is that of the matrices."""
    tokens = tokens_BT.shape[1]
    models = {"plain GPT": functools.partial(PlainGPT, shape.layers, shape.embed, shape.heads, tokens, colors)}
    if importlib.util.find_spec("transformers"):
        models = {"Hugging Face": functools.partial(hugging_face, shape, tokens, colors), **models}
    makers = {"torch's product": functools.partial(product, on_gpu, side)}
    for name, make in models.items():
        for bfloat16 in (True,) if on_gpu else (False, True):
            for compiled in (False, True):
                kind = f"{'bfloat16 autocast' if bfloat16 else 'float32'}, {'compiled' if compiled else 'eager'}"
                makers[f"{name}, {kind}"] = functools.partial(step, make, on_gpu, rate, colors, tokens_BT, bfloat16,
                                                              compiled)
    return makers
