"""Sizes of a model by letter, and its parameter count."""

import dataclasses
import math
from typing import Any

import jax

from igpt_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a model."""
    L: int  # layers
    D: int  # embed
    N: int  # heads
    H: int  # head dim
    F: int  # MLP hidden
    V: int  # vocabulary: palette colors
    T: int  # tokens: pixels
    K: int = 0  # classes; 0: no class head

    @classmethod
    def of(cls, config: ModelConfig, palette_size: int, image_size: int, classes: int = 0) -> "Dims":
        return cls(L=config.layers, D=config.embed, N=config.heads, H=config.embed // config.heads, F=config.mlp,
                   V=palette_size, T=image_size ** 2, K=classes)

    @property
    def parameter_count(self) -> int:
        """Parameters of a causal model: L (12 D^2 + 2 D) + 2 V D + T D + 2 D + K D if F = 4 D.

        The terms are blocks, color embedding and head, positions, start vector and final norm, class head. A model that
        is not causal has no start vector, so D fewer.
        """
        blocks = self.L * (4 * self.D ** 2 + 2 * self.D * self.F + 2 * self.D)
        return blocks + (2 * self.V + self.T + 2 + self.K) * self.D


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
