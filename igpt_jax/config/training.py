"""Keys of the mesh, the optimizer, and the pretrain and finetune jobs."""

import dataclasses
import math
import re
from typing import ClassVar, Optional, Self

from igpt_jax.config.data import DataConfig, FinetuneDataConfig
from igpt_jax.config.keys import (
    PRECISIONS,
    Keys,
    at_least,
    compiler_options_key,
    each,
    key,
    one_of,
    positive,
    require,
    section,
    seed_range,
    within,
)
from igpt_jax.config.model import CODECS, OBJECTIVES, FinetuneModelConfig, ModelConfig

OPTIMIZERS = ("adam", "adamw", "muon")
SECOND_MOMENTS = ("float32", "bfloat16", "factored")
SCHEDULES = ("cosine", "constant", "wsd")
PARAMETERS = ("raw", "ema")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Keys):
    group: ClassVar[str] = "optimizer."

    name: str = key("adam", "adam (paper); adamw: with weight_decay; muon: orthogonalized momentum for the matrices of "
                            "the blocks, Adam for the rest",
                    resume="same", rule=one_of(*OPTIMIZERS))
    learning_rate: float = key(0.003, "peak learning rate (quoted from the paper by others: 0.003 for S, 0.001 for "
                                      "L, 0.0003 for XL)", resume="same", rule=positive, compiled=False)
    schedule: str = key("cosine", "schedule after warm-up: cosine (to 0 at the end), constant, or wsd (constant, then "
                                  "a decay to 0)", resume="schedule", rule=one_of(*SCHEDULES))
    decay_share: float = key(0.2, "wsd: share of all steps in which the learning rate decays, at the end",
                             resume="schedule", rule=within(0, 1, "(]"), compiled=False)
    decay_shape: str = key("1-sqrt", "wsd: shape of the decay: 1-sqrt (arXiv 2405.18392) or linear", resume="schedule",
                           rule=one_of("1-sqrt", "linear"))
    warmup_steps: int = key(-1, "steps of linear warm-up from 0; -1: one epoch, as in the paper", resume="same")
    beta1: float = key(0.9, "Adam's decay of the first moment", resume="same", rule=within(0, 1, "[)"), compiled=False)
    beta2: float = key(0.95, "Adam's decay of the second moment (0.999 gave loss spikes in the paper)", resume="same",
                       rule=within(0, 1, "[)"), compiled=False)
    muon_beta: float = key(0.95, "muon: decay of the momentum", resume="same", rule=within(0, 1, "[)"), compiled=False)
    second_moment: str = key("float32", "storage of Adam's second moment: float32; bfloat16: half the memory, beta2 "
                                        "up to 0.99; factored: a row and a column per matrix, nearly no memory "
                                        "(Shazeer and Stern 2018)",
                             resume="same", rule=one_of(*SECOND_MOMENTS))
    epsilon: float = key(1e-8, "Adam's epsilon, added outside the root; the paper does not state one", resume="same",
                         rule=at_least(0), compiled=False)
    weight_decay: float = key(0.0, "decoupled weight decay of matrices; the paper uses none", resume="same",
                              rule=at_least(0))
    clip_norm: float = key(0.0, "global gradient norm above which gradients are scaled down; 0: off, as in the paper",
                           resume="same", rule=at_least(0))
    ema: float = key(0.0, "decay per update of an exponential moving average of the parameters, such as 0.999; 0: no "
                          "average",
                     resume="same", rule=within(0, 1, "[)"))
    spike_factor: float = key(0.0, "gradient norm above which an update is skipped, in multiples of its running mean; "
                                   "0: off, as in the paper", resume="same")

    def __post_init__(self):
        super().__post_init__()
        require(self.warmup_steps >= -1, f"optimizer.warmup_steps={self.warmup_steps} must be -1 (one epoch) or more.")
        require(self.spike_factor == 0 or self.spike_factor > 1,
                f"optimizer.spike_factor={self.spike_factor} must be above 1, or 0 to skip no updates.")
        require(self.name != "adamw" or self.weight_decay > 0,
                "optimizer.name=adamw decays weights. Set optimizer.weight_decay, such as 0.1, or optimizer.name=adam.")
        for names, needed, value in ((("decay_share", "decay_shape"), "schedule", "wsd"),
                                     (("muon_beta",), "name", "muon")):
            if (given := getattr(self, needed)) != value:
                self.refuse_given(*names, why=f"on optimizer.{needed}={given}. Set optimizer.{needed}={value}.")

    def constant_until(self, steps: int) -> float:
        """The last step at the peak learning rate, after warm-up; infinite if the rate never falls."""
        decay_start = steps - max(1, round(self.decay_share * steps))
        return {"cosine": 0, "constant": math.inf, "wsd": decay_start}[self.schedule]


@dataclasses.dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    learning_rate: float = key(0.0003, "peak learning rate (paper: best at about a tenth of pretraining's)",
                               resume="same", rule=positive, compiled=False)
    schedule: str = key("constant", "schedule after warm-up: constant (paper), cosine (to 0 at the end), or wsd "
                                    "(constant, then a decay to 0)", resume="schedule", rule=one_of(*SCHEDULES))
    warmup_steps: int = key(0, "steps of linear warm-up from 0; -1: one epoch", resume="same")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Keys):
    """Sizes of the mesh axes. Their product is the number of devices; one of them may be -1 for the devices left."""
    group: ClassVar[str] = "mesh."

    data: int = key(1, "copies of the state (data parallel); the batch is split over data x fsdp", resume="free")
    fsdp: int = key(-1, "devices that share one copy of the state (fully sharded data parallel)", resume="free")
    tensor: int = key(1, "devices that share each layer's heads and MLP (tensor parallel)", resume="free")
    context: int = key(1, "devices that share each sequence (context parallel), and one copy of the state",
                       resume="free")

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context")}

    def __post_init__(self):
        super().__post_init__()
        sizes = self.sizes
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}={size} must be positive, or -1 for the devices left.")
        require(list(sizes.values()).count(-1) <= 1, f"mesh={sizes}: only one axis may be -1.")

    def resolve(self, devices: int) -> "MeshConfig":
        """The mesh with -1 replaced, for `devices` devices. Raises UserError if their number is not the product."""
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        filled = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
        given = " x ".join(f"{name}={size}" for name, size in sizes.items())
        require(math.prod(filled.values()) == devices,
                f"mesh {given} does not multiply to the {devices} devices here. "
                f"Set mesh.fsdp=-1 for the devices left, and other axes that divide {devices}.")
        return dataclasses.replace(self, **filled)


@dataclasses.dataclass(frozen=True)
class TrainMeshConfig(MeshConfig):
    reduce_dtype: str = key("bfloat16", "dtype in which gradients of the blocks' weights are sent and summed over "
                                        "devices: bfloat16 or float32, at precision=bfloat16; wider ones sum in their "
                                        "own", resume="same", rule=one_of("bfloat16", "float32"))


@dataclasses.dataclass(frozen=True)
class SampleMeshConfig(MeshConfig):
    """The mesh of sampling. By default every device has all weights; under fsdp they are gathered for every pixel."""
    data: int = key(-1, "copies of the weights; the batch is split over data x fsdp", resume="free")
    fsdp: int = key(1, "devices that share one copy of the weights; slow, because it is gathered for every pixel",
                    resume="free")


def profile_range(name: str, value: tuple[int, ...]) -> None:
    """() or (first, last) with 1 <= first <= last."""
    require(not value or len(value) == 2 and 1 <= value[0] <= value[1],
            f"{name}={value} must be a first and a last step, such as (100,105), or ().")


def kept_step(name: str, value: int) -> None:
    """A positive number of steps."""
    require(value > 0, f"{name}: {value} must be a positive number of steps.")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Keys):
    job: str = key("pretrain", "the job that this configuration is for", resume="same")
    objective: str = key("autoregressive", "autoregressive: each pixel from those before it; masked: hidden pixels "
                                           "from all others (BERT); denoising: randomly recolored pixels from the "
                                           "whole image; diffusion: masked at any mask ratio, its loss a likelihood "
                                           "bound", resume="same", rule=one_of(*OBJECTIVES))
    mask_ratio: float = key(0.15, "masked, denoising: share of pixels to predict, drawn in each step (paper: 0.15)",
                            resume="same", rule=within(0, 1, "()"), alias="masked_share")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    mesh: TrainMeshConfig = section(TrainMeshConfig)
    image_size: int = key(0, "height and width, pixels, which must be the store's; 0: the store's",
                          resume="free", rule=at_least(0))
    codec: str = key("palette", "tokens of a pixel: palette, the index of its nearest color (paper); rgb, its three "
                                "bytes; grey, its luma, one byte", resume="same", rule=one_of(*CODECS))
    palette: str = key("", "a palette's .npy; empty: the store's own", resume="free", compiled=False)
    steps: int = key(1_000_000, "optimizer steps (paper: 1M; 2M for XL)", resume="schedule",
                     rule=within(1, 2**31 - 1), compiled=False)
    branch_from: str = key("", "a step of another run's checkpoints (DIR/checkpoints/STEP) to continue with another "
                               "schedule; empty: a new run", resume="same", compiled=False)
    batch_size: int = key(128, "images per step over all devices (paper: 128; 64 for XL)", resume="same",
                          rule=at_least(1))
    images_per_pass: int = key(0, "maximum images per device and microbatch; the number of microbatches follows from "
                                  "it, on any number of devices; 0: use accumulate",
                               resume="free", rule=at_least(0))
    accumulate: int = key(1, "microbatches per step (gradient accumulation)",
                          resume="free", rule=at_least(1))
    seed: int = key(0, "seed of initial weights, data order, masks and dropout", resume="same", rule=seed_range,
                    compiled=False)
    precision: str = key("auto", "dtype of activations and matrix products: bfloat16 or float32 (parameters are "
                                 "float32); auto: bfloat16, on CPUs float32; float64: everything, for tests",
                         resume="same", rule=one_of("auto", *PRECISIONS))
    compiler_options: str = compiler_options_key()
    max_skipped_updates: int = key(20, "consecutive skipped updates (loss or gradient not finite, or a spike) after "
                                       "which the run ends as diverged (exit code 77)",
                                   resume="free", rule=at_least(1), compiled=False)
    skip_divergence: bool = key(False, "after exit code 77: resume from the newest checkpoint, and skip the examples "
                                       "that the run diverged on", resume="free", compiled=False)
    accept_changes: tuple[str, ...] = key((), "keys (also palette, data) in which this run may differ from its "
                                              "checkpoint; the next checkpoints record the change",
                                          resume="free", compiled=False)
    stall_seconds: float = key(1800.0, "seconds without a finished step, evaluated batch or save before the run ends "
                                       "as stuck (exit code 76); compilation is excluded; 0: never",
                               resume="free", rule=at_least(0), compiled=False)
    compare_replicas_every_steps: int = key(0, "steps between comparisons of replicated arrays across devices, also "
                                               "before each save; 0: never",
                                            resume="free", rule=at_least(0), compiled=False)
    replay_check: bool = key(False, "on resume, repeat logged steps from an earlier checkpoint and compare the losses",
                             resume="free", compiled=False)
    profile: tuple[int, ...] = key((), "first and last step to trace, such as (100,105); empty: none", resume="free",
                                   rule=profile_range, compiled=False)
    noise_scale_every_steps: int = key(0, "steps between measurements of the gradient noise scale, each at the cost of "
                                          "one forward and backward pass; 0: never",
                                       resume="free", rule=at_least(0), compiled=False)
    log_every_steps: int = key(50, "steps between metrics lines", resume="free", rule=at_least(1), compiled=False)
    wandb: str = key("", "Weights & Biases project to log to: PROJECT or ENTITY/PROJECT; empty: none",
                     resume="free", compiled=False)
    eval_every_steps: int = key(5000, "steps between evaluations on data.held_out, each with a checkpoint; 0: only at "
                                      "the end", resume="free", rule=at_least(0), compiled=False)
    checkpoint_every_steps: int = key(1000, "steps between checkpoints; 0: only at the end", resume="free",
                                      rule=at_least(0), compiled=False)
    keep_newest: int = key(2, "number of newest checkpoints kept, in addition to the best by held-out loss",
                           resume="free", rule=at_least(1), compiled=False)
    keep_steps: tuple[int, ...] = key((65536, 131072, 262144, 524288, 1000000),
                                      "steps whose checkpoints are saved and never deleted (paper, Figure 3)",
                                      resume="free", rule=each(kept_step), compiled=False)

    def __post_init__(self):
        super().__post_init__()
        require(bool(re.fullmatch(r"([^/\s]+/)?[^/\s]+|", self.wandb)),
                f"wandb={self.wandb!r} must be PROJECT or ENTITY/PROJECT.")
        if self.objective not in ("masked", "denoising"):
            self.refuse_given("mask_ratio", why=f"on objective={self.objective}. Set objective=masked or denoising.")
        if self.codec not in ("", "palette"):
            self.refuse_given("palette", why=f"on codec={self.codec}. Leave it out.")

    @property
    def channels(self) -> int:
        """Tokens per pixel."""
        return CODECS[self.codec]

    def with_microbatches(self, shards: int) -> Self:
        """The config with the fewest equal microbatches that `images_per_pass` allows, for a batch that is split over
        `shards` devices; itself without images_per_pass."""
        if not self.images_per_pass:
            return self
        # Microbatches must be of equal size, since the step averages their means. Therefore the count has to divide a
        # device's images, and the search takes the first divisor that makes them few enough.
        images = max(1, self.batch_size // shards)
        microbatches = next(count for count in range(1, images + 1)
                            if images % count == 0 and images // count <= self.images_per_pass)
        return dataclasses.replace(self, accumulate=microbatches)

    @property
    def finetuning(self) -> Optional["FinetuneConfig"]:
        """This config as a FinetuneConfig; None in pretraining."""
        return None


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Pretrain's keys, some with other defaults, and the keys of classification."""
    job: str = key("finetune", "the job that this configuration is for", resume="same")
    checkpoint: str = key("", "a workdir of pretrain or one step of it (DIR/checkpoints/STEP); empty: a new model, "
                              "model.name", resume="same", compiled=False)
    parameters: str = key("raw", "the checkpoint's parameters to start from: raw, or ema (their moving average)",
                          resume="same", rule=one_of(*PARAMETERS), compiled=False)
    generative_weight: float = key(1.0, "weight of the objective's loss on pixels; 0: classification only",
                                   resume="same", rule=at_least(0))
    class_weight: float = key(1.0, "weight of the classification loss (paper: both 1)", resume="same")
    patience: int = key(0, "early stopping: evaluations without a better held-out accuracy; 0: off", resume="free",
                        rule=at_least(0), compiled=False)
    data: FinetuneDataConfig = section(FinetuneDataConfig)
    model: FinetuneModelConfig = section(FinetuneModelConfig)
    optimizer: FinetuneOptimizerConfig = section(FinetuneOptimizerConfig)
    codec: str = key("", "tokens of a pixel, of a new model: palette, rgb or grey; empty: the checkpoint's, or palette",
                     resume="same", rule=one_of("", *CODECS))
    palette: str = key("", "palette's .npy for a new model; empty: the store's own. A checkpoint has its own",
                       resume="free", compiled=False)
    objective: str = key("autoregressive", "objective of the checkpoint: autoregressive, masked (BERT), denoising or "
                                           "diffusion", resume="same", rule=one_of(*OBJECTIVES))
    mask_ratio: float = key(0.15, "masked, denoising: share of pixels to predict, in evaluation too", resume="same",
                            rule=within(0, 1, "()"), alias="masked_share")
    steps: int = key(10_000, "optimizer steps, at most", resume="schedule", rule=within(1, 2**31 - 1), compiled=False)
    eval_every_steps: int = key(500, "steps between evaluations on data.held_out, each with a checkpoint; 0: only at "
                                     "the end", resume="free", rule=at_least(0), compiled=False)
    keep_steps: tuple[int, ...] = key((), "steps whose checkpoints are saved and never deleted", resume="free",
                                      rule=each(kept_step), compiled=False)

    def __post_init__(self):
        if not self.checkpoint:
            self.refuse_given("parameters", why="without a checkpoint. Leave it out.")
            object.__setattr__(self, "codec", self.codec or "palette")
        super().__post_init__()
        require(self.class_weight > 0,
                f"class_weight={self.class_weight} must be positive. To train without labels, run the pretrain job.")
        require(self.patience == 0 or bool(self.data.held_out) and self.eval_every_steps > 0,
                f"patience={self.patience} needs evaluations on held-out images, and this run has none. Set "
                "data.held_out and eval_every_steps, or patience=0.")

    @property
    def finetuning(self) -> "FinetuneConfig":
        return self
