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

# Tokens per pixel. `palette` has as many different tokens as colors, the others have LEVELS (data/codecs.py).
CODECS: Mapping[str, int] = types.MappingProxyType({"palette": 1, "rgb": 3, "grey": 1})
LEVELS = 256

ATTENTION_BACKENDS = ("auto", "reference", "blocked", "splash", "cudnn")
REMAT_POLICIES = ("none", "attention", "dots", "offload", "full")
POSITIONS = ("learned", "factored")
PARAMETRIZATIONS = ("standard", "completep")
OBJECTIVES = ("autoregressive", "masked", "denoising", "diffusion")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Keys):
    group: ClassVar[str] = "model."

    name: str = key("igpt_s", f"row of the model table: {', '.join(MODELS)}", resume="same", rule=one_of(*MODELS))
    layers: int = key(0, "number of blocks; 0: as in the model table", resume="same")
    embed: int = key(0, "width of the residual stream; 0: as in the model table", resume="same")
    heads: int = key(0, "attention heads; 0: as in the model table", resume="same")
    mlp: int = key(0, "width of the MLP's hidden layer; 0: 4 x embed", resume="same")
    init: str = key("released", "released: as OpenAI's code; paper: as Sparse Transformers (paper, Section 3.3)",
                    resume="same", rule=one_of("released", "paper"))
    parametrization: str = key("standard", "standard: as released; completep: learning rates transfer over width and "
                                           "depth (arXiv 2505.01618)",
                               resume="same", rule=one_of(*PARAMETRIZATIONS))
    base_embed: int = key(512, "completep: width at which it is the standard model; that of the model whose learning "
                               "rate is known", resume="same", rule=at_least(1))
    base_layers: int = key(24, "completep: depth at which it is the standard model", resume="same", rule=at_least(1))
    positions: str = key("learned", "position embeddings. learned: one per token (paper); factored: a row's, a "
                                    "column's and a channel's, summed",
                         resume="same", rule=one_of(*POSITIONS))
    dropout: float = key(0.0, "dropout rate of residual activations in training; the paper uses none",
                         resume="same", rule=within(0, 1, "[)"))
    attention: str = key("auto", f"attention back-end: {', '.join(ATTENTION_BACKENDS)}", resume="free",
                         rule=one_of(*ATTENTION_BACKENDS))
    remat: str = key("attention", "rematerialization, activations recomputed in the backward pass: none; dots: all but "
                                  "matrix products and attention; attention: all but attention; offload: the same, "
                                  "with the saved ones in host memory; full: all",
                     resume="free", rule=one_of(*REMAT_POLICIES))
    unroll: int = key(0, "blocks per iteration of the loop over blocks; model.layers: no loop, slower to compile; "
                         "0: no loop on TPU v4 up to 36 blocks, v5p and v6e up to 60; otherwise 1",
                      resume="free", rule=at_least(0))

    def __post_init__(self):
        super().__post_init__()
        for name, row in zip(("layers", "embed", "heads"), MODELS[self.name], strict=True):
            size = getattr(self, name)
            require(size >= 0, f"model.{name}={size} must be positive, or 0 to use the model table's.")
            object.__setattr__(self, name, size or row)
        require(self.mlp >= 0, f"model.mlp={self.mlp} must be positive, or 0 for 4 x model.embed.")
        object.__setattr__(self, "mlp", self.mlp or 4 * self.embed)
        if self.parametrization != "completep":
            self.refuse_given("base_embed", "base_layers", why=f"on model.parametrization={self.parametrization}. Set "
                              "model.parametrization=completep.")
        require(self.embed % self.heads == 0,
                f"model.embed={self.embed} is not a multiple of model.heads={self.heads}. Choose heads that divide it.")


# What a checkpoint decides of the model that is fine-tuned.
OF_CHECKPOINT = ("layers", "embed", "heads", "mlp", "init", "parametrization", "base_embed", "base_layers", "positions")


@dataclasses.dataclass(frozen=True)
class FinetuneModelConfig(ModelConfig):
    """Pretrain's keys of the model. A checkpoint has its own sizes, so they are given only to train from scratch."""
    name: str = key("", f"without a checkpoint: row of the model table: {', '.join(MODELS)}", resume="same",
                    rule=one_of("", *MODELS))
    class_layer: int = key(-1, "layer that the class head reads, 0 (the embedding) to L; -1: the last",
                           resume="same")

    def __post_init__(self):
        if self.name:
            super().__post_init__()
            require(-1 <= self.class_layer <= self.layers, f"model.class_layer={self.class_layer} must be from 0 "
                    f"(the embedding) to {self.layers}, or -1 for the last layer.")
        elif given := [name for name in OF_CHECKPOINT if getattr(self, name) != getattr(ModelConfig, name)]:
            raise UserError(f"model.{given[0]} is set without model.name. To train from scratch, set model.name to a "
                            f"row of the model table; a checkpoint has its own {given[0]}.")
