"""Keys of the model, and the table of model sizes."""

import dataclasses
import types
from collections.abc import Mapping
from typing import ClassVar

from igpt_jax.config.keys import Keys, UserError, at_least, key, one_of, require, within

# Layers, embedding width, heads. Sources: the paper, Section 3.3 and Table 2; the heads of S, M and L from
# OpenAI's released code. No source gives the heads of XL: 24 heads of 128 suit matrix units.
MODELS: Mapping[str, tuple[int, int, int]] = types.MappingProxyType({
    "igpt_tiny": (6, 128, 4),
    "igpt_10m": (12, 256, 8),
    "igpt_s": (24, 512, 8),
    "igpt_m": (36, 1024, 8),
    "igpt_l": (48, 1536, 16),
    "igpt_xl": (60, 3072, 24),
})

ATTENTION_BACKENDS = ("auto", "reference", "blocked", "splash", "cudnn")
REMAT_POLICIES = ("none", "attention", "dots", "offload", "full")
OBJECTIVES = ("autoregressive", "masked", "denoising")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Keys):
    group: ClassVar[str] = "model."

    name: str = key("igpt_s", f"row of the model table: {', '.join(MODELS)}", resume="same", rule=one_of(*MODELS))
    layers: int = key(0, "blocks; 0: as in the model table", resume="same")
    embed: int = key(0, "width of the residual stream; 0: as in the model table", resume="same")
    heads: int = key(0, "attention heads; 0: as in the model table", resume="same")
    mlp: int = key(0, "width of the MLP's hidden layer; 0: 4 x embed", resume="same")
    init: str = key("released", "released: as OpenAI's code; paper: as Sparse Transformers (paper, Section 3.3)",
                    resume="same", rule=one_of("released", "paper"))
    dropout: float = key(0.0, "share of residual activations dropped while training; the paper uses none",
                         resume="same", rule=within(0, 1, "[)"))
    attention: str = key("auto", f"back-end: {', '.join(ATTENTION_BACKENDS)}", resume="free",
                         rule=one_of(*ATTENTION_BACKENDS))
    remat: str = key("attention", "what the backward pass recomputes: none, dots (all but matrix products and "
                                  "attention), attention (all but attention), offload (as attention, which is kept in "
                                  "the host's memory), full (each whole block)",
                     resume="free", rule=one_of(*REMAT_POLICIES))
    unroll: int = key(1, "blocks per iteration of the loop over blocks; model.layers: no loop, longer to compile",
                      resume="free", rule=at_least(1))

    def __post_init__(self):
        super().__post_init__()
        for name, row in zip(("layers", "embed", "heads"), MODELS[self.name], strict=True):
            size = getattr(self, name)
            require(size >= 0, f"model.{name}={size} must be positive, or 0 for the model table's.")
            object.__setattr__(self, name, size or row)
        require(self.mlp >= 0, f"model.mlp={self.mlp} must be positive, or 0 for 4 x model.embed.")
        object.__setattr__(self, "mlp", self.mlp or 4 * self.embed)
        require(self.embed % self.heads == 0,
                f"model.embed={self.embed} is not a multiple of model.heads={self.heads}. Choose a divisor.")


@dataclasses.dataclass(frozen=True)
class FinetuneModelConfig(ModelConfig):
    """A checkpoint brings its own sizes: give them only to train from scratch."""
    name: str = key("", f"without a checkpoint: row of the model table: {', '.join(MODELS)}", resume="same",
                    rule=one_of("", *MODELS))
    class_layer: int = key(-1, "place in the stream that the class head reads, 0 (the embedding) to L; -1: the last",
                           resume="same")

    def __post_init__(self):
        if self.name:
            super().__post_init__()
            require(-1 <= self.class_layer <= self.layers, f"model.class_layer={self.class_layer}: the model has "
                    f"places 0 (the embedding) to {self.layers}; -1 is the last.")
        elif given := [name for name in ("layers", "embed", "heads", "mlp") if getattr(self, name)]:
            raise UserError(f"model.{given[0]} is set and model.name is not. Name a row of the model table to train "
                            "from scratch; a checkpoint brings its own sizes.")
