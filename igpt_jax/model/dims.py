"""The sizes of a model, by their letters, and the parameter count that follows from them."""

import dataclasses
import math
from typing import Any

import jax

from igpt_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes of a model, by their letters."""
    L: int
    D: int
    N: int
    H: int
    F: int
    V: int
    T: int
    K: int = 0

    @classmethod
    def of(cls, config: ModelConfig, palette_size: int, image_size: int, classes: int = 0) -> "Dims":
        return cls(L=config.layers, D=config.embed, N=config.heads, H=config.embed // config.heads, F=config.mlp,
                   V=palette_size, T=image_size ** 2, K=classes)

    @property
    def parameter_count(self) -> int:
        """L (12 D^2 + 2 D) + 2 V D + T D + 2 D + K D for an MLP of 4 D: blocks, colors, positions, start and norm,
        classes. A model that is not causal has no start vector: D fewer.
        """
        blocks = self.L * (4 * self.D ** 2 + 2 * self.D * self.F + 2 * self.D)
        return blocks + (2 * self.V + self.T + 2 + self.K) * self.D


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
