"""How initial weights, multipliers, learning rates and Adam's epsilon follow a model's width and depth.

`standard` is the model as released: nothing but its initial weights depends on its size. `completep` keeps the sizes of
activations and of their updates the same at any width and depth, so that the learning rate of a small model is right
for a large one (Dey et al. 2025, arXiv 2505.01618, Table 1 with alpha = 1 and Equation 40; width as in muP, Yang et al.
2021, arXiv 2203.03466). At the base width and depth it is the standard model. With the ratios
m = embed / base_embed and l = layers / base_layers:

    parameters               initial deviation   multiplier          learning rate    Adam's epsilon
    embeddings, final norm   the base's                                               1 / m
    matrices of blocks       the base's / m^.5   1 / l, of branches  1 / m            1 / (m l)
    norms of blocks                                                                   1 / (m l)
    heads                    0                   1 / m, of logits                     1 / m

Muon's updates of a matrix have singular values in proportion to m^.5 (`optimizer.MUON_RMS`), where Adam's have m, so
its learning rate falls as 1 / m^.5. The table assumes the same head dim and the same mlp / embed at all sizes.

L layers, D embed, F MLP hidden.
"""

import dataclasses

from igpt_jax.config import ModelConfig
from igpt_jax.model.dims import Dims
from igpt_jax.parallel.sharding import letters_for

POSITION_TABLES = (("position_embed_TD",), ("row_embed_YD", "column_embed_XD", "channel_embed_CD"))  # learned, factored


def ratios(config: ModelConfig) -> tuple[float, float]:
    """(m, l): width and depth over the base's. (1, 1) under standard."""
    if config.parametrization == "standard":
        return 1.0, 1.0
    return config.embed / config.base_embed, config.layers / config.base_layers


def branch_multiplier(config: ModelConfig) -> float:
    """Of the outputs of attention and MLP, before they are added to the residual stream."""
    return 1 / ratios(config)[1]


def head_multiplier(config: ModelConfig) -> float:
    """Of the logits of pixels and classes."""
    return 1 / ratios(config)[0]


def folded(config: ModelConfig, name: str) -> float:
    """The factor that a parameter takes when a completep model becomes the standard model of the same function."""
    if name in ("out_NHD", "down_FD"):
        return branch_multiplier(config)
    return head_multiplier(config) if name in ("head_VD", "class_head_KD") else 1.0


def position_tables(config: ModelConfig) -> tuple[str, ...]:
    """The names of the tables that embed positions. Several are summed."""
    return POSITION_TABLES[config.positions == "factored"]


def is_hidden(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix of a block, stacked over layers: the others keep Adam under Muon."""
    letters = letters_for(name, ndim)
    return letters.startswith("L") and len(letters) > 2


def learning_rate_multiplier(config: ModelConfig, name: str, ndim: int, optimizer: str) -> float:
    """Of a parameter's updates."""
    width, _ = ratios(config)
    if not is_hidden(name, ndim):
        return 1.0
    return width ** (-0.5 if optimizer == "muon" else -1.0)


def epsilon_multiplier(config: ModelConfig, name: str, ndim: int) -> float:
    """Of Adam's epsilon: gradients shrink as the model grows, and epsilon with them."""
    width, depth = ratios(config)
    return 1 / (width * (depth if letters_for(name, ndim).startswith("L") else 1.0))


def standard_deviations(config: ModelConfig, d: Dims) -> dict[str, float]:
    """Standard deviations of the initial weights; norms start at 1 and heads at 0 in all schemes.

    init=released: the initializers in OpenAI's code. paper: Section 3.3 refers to Sparse Transformers (Child et al.
    2019, Section 6): 0.125 / sqrt(fan in), and the last matrix of each residual branch divided by sqrt(2 L) besides.
    """
    width, depth = ratios(config)
    if (width, depth) == (1, 1):
        return _at(config.init, d)
    base = dataclasses.replace(d, L=config.base_layers, D=config.base_embed, F=round(d.F / width))
    hidden = {"query_DNH", "key_DNH", "value_DNH", "out_NHD", "up_DF", "down_FD"}
    return {name: deviation * (width ** -0.5 if name in hidden else 1)
            for name, deviation in _at(config.init, base).items()}


def _of_positions(deviation: float, d: Dims) -> dict[str, float]:
    """Tables whose sum has this deviation."""
    names = POSITION_TABLES[d.factored]
    return dict.fromkeys(names, deviation * len(names) ** -0.5)


def _at(init: str, d: Dims) -> dict[str, float]:
    if init == "released":
        return {"token_embed_VD": 0.02, "start_D": 0.02, **_of_positions(0.01, d),
                "query_DNH": d.D ** -0.5, "key_DNH": d.D ** -0.5, "value_DNH": d.D ** -0.5,
                "out_NHD": (d.D * d.L) ** -0.5, "up_DF": 0.02, "down_FD": 0.02}
    narrow, wide, branch = 0.125 * d.D ** -0.5, 0.125 * d.F ** -0.5, (2 * d.L) ** -0.5
    return {"token_embed_VD": narrow, "start_D": narrow, **_of_positions(narrow, d),
            "query_DNH": narrow, "key_DNH": narrow, "value_DNH": narrow, "out_NHD": narrow * branch,
            "up_DF": narrow, "down_FD": wide * branch}
