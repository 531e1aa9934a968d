"""The runs of a scaling study: every size at every budget, as ordinary pretraining configs."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from igpt_jax.config import PretrainConfig, ScalingConfig, UserError
from igpt_jax.config.keys import require
from igpt_jax.config.model import MODELS, ModelConfig
from igpt_jax.model.dims import Dims
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.model.objectives import objective_of

COUNTS: Mapping[str, str] = {"all": "all parameters", "no_embedding": "without color and position embeddings",
                             "blocks": "without embeddings and head"}
# Batches grow with a run's tokens to the power of nanochat's fit. The anchor is iGPT-S in the paper: 1M steps of 128
# images of 1,024 tokens.
BATCH_EXPONENT = 0.383
ANCHOR_BATCH_TOKENS = 128 * 1024
ANCHOR_TOKENS = 128 * 1024 * 1_000_000
SMALLEST_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a study."""
    name: str  # its folder in the workdir
    config: PretrainConfig
    budget: float  # FLOPs
    flops: float  # that its whole number of steps takes
    tokens: int
    parameters: Mapping[str, int]  # by the names of COUNTS
    turn: int  # modulo n, the run's slice of n: neighbors differ, and added budgets and sizes change no other's


def parameter_counts(dims: Dims) -> dict[str, int]:
    """The parameters of a model, counted in three ways. Fitted exponents depend on the choice."""
    embeddings = (dims.V + dims.positions) * dims.D
    every = dims.parameter_count
    return {"all": every, "no_embedding": every - embeddings, "blocks": every - embeddings - dims.V * dims.D}


def batch_size_for(tokens: float, tokens_per_image: int) -> int:
    """Images per step for a run of that many tokens: the nearest power of two to the rule above, at least 8."""
    images = ANCHOR_BATCH_TOKENS * (tokens / ANCHOR_TOKENS) ** BATCH_EXPONENT / tokens_per_image
    return max(SMALLEST_BATCH, 2 ** round(math.log2(images)))


def model_of(size: str, base: ModelConfig) -> ModelConfig:
    """`base` with the size of a row of the model table, or LAYERSxWIDTH[xHEADS]. Raises UserError for other text."""
    if size in MODELS:
        layers, embed, heads = MODELS[size]
    elif found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", size):
        layers, embed = int(found[1]), int(found[2])
        heads = int(found[3] or 0) or _heads_for(embed)
    else:
        raise UserError(f"sizes: {size!r} is not a size. Use LAYERSxWIDTH, such as 6x128, LAYERSxWIDTHxHEADS, or a row "
                        f"of the model table: {', '.join(MODELS)}.")
    name = size if size in MODELS else base.name
    return dataclasses.replace(base, name=name, layers=layers, embed=embed, heads=heads, mlp=4 * embed)


def _heads_for(embed: int) -> int:
    """Heads of about 32 dims in small models and 64 from width 512 on, as in the model table."""
    wanted = max(1, embed // (64 if embed >= 512 else 32))
    return max(heads for heads in range(1, wanted + 1) if embed % heads == 0)


def planned(config: ScalingConfig, image_size: int, vocabulary: int) -> list[Planned]:
    """Every size at every budget, cheapest budget first.

    Steps follow from the budget by the exact FLOP count (`model.flops`), and the batch from the tokens by
    `batch_size_for`, unless `batch_size` sets it.

    Raises:
      UserError: a size is not one, or a budget is too small for one step.
    """
    require(bool(config.budgets), "budgets is empty. Name training FLOPs: --config.budgets='(1e13,3e13,1e14)'.")
    require(bool(config.sizes), "sizes is empty. Name sizes: --config.sizes=\"('4x64','6x96','6x128')\".")
    for name in ("steps", "batch_size", "keep_steps"):
        require(getattr(config.pretrain, name) == getattr(PretrainConfig, name),
                f"pretrain.{name} has no effect: budgets and sizes decide the steps. Leave it out"
                f"{', or set batch_size' if name == 'batch_size' else ''}.")
    for name in ("layers", "embed", "heads", "mlp"):
        require(getattr(config.pretrain.model, name) == getattr(ModelConfig(config.pretrain.model.name), name),
                f"pretrain.model.{name} has no effect: sizes decide it. Leave it out.")
    require(not config.pretrain.optimizer.ema, "pretrain.optimizer.ema has no effect: losses, probes and completions "
            "are those of the raw parameters. Leave it out, or set pretrain.optimizer.schedule=wsd.")
    causal = objective_of(config.pretrain).causal
    runs = []
    for budget, (place, size) in itertools.product(sorted(config.all_budgets), enumerate(config.sizes)):
        model = model_of(size, config.pretrain.model)
        dims = Dims.of(model, vocabulary, image_size, channels=config.pretrain.channels)
        per_image = train_flops_per_image(dims.L, dims.D, dims.F, dims.V, dims.T, causal)
        batch = config.batch_size or batch_size_for(budget / per_image * dims.T, dims.T)
        steps = round(budget / (per_image * batch))
        if steps < 1:
            raise UserError(f"a budget of {budget:.3g} FLOPs is less than one step of {size} with {batch} images "
                            f"({per_image * batch:.3g} FLOPs). Raise budgets, or set a smaller batch_size.")
        name, warmup = f"{label(budget)}-{size}", config.pretrain.optimizer.warmup_steps
        require(warmup <= steps, f"pretrain.optimizer.warmup_steps={warmup} exceeds the {steps:,} steps of {name}. "
                "Leave it out: each run then warms up for a twentieth of its steps.")
        pretrain = dataclasses.replace(config.pretrain, model=model, steps=steps, batch_size=batch, keep_steps=(),
                                       optimizer=_with_warmup(config.pretrain, steps))
        runs.append(Planned(name, pretrain, budget, steps * batch * per_image, steps * batch * dims.T,
                            parameter_counts(dims), round(2 * math.log10(budget)) + place))
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two budgets have the run {twice}: they agree to three digits. Name one of them.")
    return runs


def _with_warmup(config: PretrainConfig, steps: int):
    """The optimizer's keys. One epoch of warm-up, the default, would take most of a short run: it gets a twentieth."""
    if config.optimizer.warmup_steps >= 0:
        return config.optimizer
    return dataclasses.replace(config.optimizer, warmup_steps=max(1, steps // 20))


def label(budget: float) -> str:
    """1e13 for 10000000000000.0."""
    return re.sub(r"e\+0*", "e", f"{budget:.3g}")
