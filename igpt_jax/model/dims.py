"""Sizes of a model by letter, and its parameter count."""

import dataclasses
import math
from typing import Any

import jax

from igpt_jax.config import ModelConfig, PretrainConfig


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a model."""
    L: int  # layers
    D: int  # embed
    N: int  # heads
    H: int  # head dim
    F: int  # MLP hidden
    V: int  # vocabulary: palette colors, or levels of a byte
    T: int  # tokens: pixels x channels
    K: int = 0  # classes; 0: no class head
    C: int = 1  # channels: tokens per pixel
    factored: bool = False  # whether positions are embedded by row, column and channel

    @classmethod
    def of(cls, config: ModelConfig, vocabulary: int, image_size: int, classes: int = 0, channels: int = 1) -> "Dims":
        return cls(L=config.layers, D=config.embed, N=config.heads, H=config.embed // config.heads, F=config.mlp,
                   V=vocabulary, T=image_size ** 2 * channels, K=classes, C=channels,
                   factored=config.positions == "factored")

    @property
    def Y(self) -> int:
        """Rows of an image."""
        return math.isqrt(self.T // self.C)

    @property
    def X(self) -> int:
        """Columns of an image."""
        return self.Y

    @property
    def row(self) -> int:
        """Tokens of a row of pixels."""
        return self.X * self.C

    @property
    def positions(self) -> int:
        """Vectors in the position tables."""
        return self.Y + self.X + self.C if self.factored else self.T

    @property
    def parameter_count(self) -> int:
        """Parameters of a causal model: L (12 D^2 + 2 D) + 2 V D + T D + 2 D + K D if F = 4 D.

        The terms are blocks, color embedding and head, positions, start vector and final norm, class head. A model that
        is not causal has no start vector, so D fewer.
        """
        blocks = self.L * (4 * self.D ** 2 + 2 * self.D * self.F + 2 * self.D)
        return blocks + (2 * self.V + self.positions + 2 + self.K) * self.D


def tokens_per_parameter(config: PretrainConfig, tokens: int, parameters: int) -> tuple[str, str]:
    """The tokens that a run reads per parameter, and advice where they are far from the best use of its FLOPs.

    Next-pixel prediction at 32x32 is compute-optimal at 10 to 20 times the 20 tokens per parameter of language, so 200
    to 400 (Yan et al. 2025, arXiv 2511.08704). Far is a factor of two.

    Args:
      tokens: of one image.
    """
    ratio = config.steps * config.batch_size * tokens / parameters
    text = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    if 100 <= ratio <= 800:
        return text, ""
    other = "smaller model on more" if ratio < 100 else "larger model on fewer"
    return text, (f"{text} tokens per parameter are far from the compute-optimal 200 to 400 (arXiv 2511.08704). "
                  f"A {other} images should reach a lower loss for the same FLOPs.")


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
