"""Every configuration key, with its default and its unit. No JAX is imported here.

A job's configuration is one frozen dataclass. `base_config(job)` turns it into a locked `ConfigDict` for
config files and the command line; `parse` turns that back into the dataclass. Both reject unknown keys and
name the nearest known one. `python -m igpt_jax JOB --help` prints a job's keys.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections


class UserError(Exception):
    """Something the user typed or gave cannot work. The message says what, the rule and the fix, in one line."""


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' with the nearest of `known`, or the list of all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def key(default: Any, doc: str) -> Any:
    """A configuration key: its default, and what it means with its unit."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def section(cls: type) -> Any:
    """A nested group of configuration keys."""
    return dataclasses.field(default_factory=cls)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    _require(value in known, f"{name}={value!r} is not known. {nearest(value, known)}")


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

PRECISIONS = ("bfloat16", "float32", "float64")
ATTENTION_BACKENDS = ("auto", "reference", "blocked", "splash", "cudnn")
REMAT_POLICIES = ("none", "attention", "dots", "offload", "full")
OBJECTIVES = ("autoregressive", "masked")
SECOND_MOMENTS = ("float32", "bfloat16", "factored")
JOBS: Mapping[str, str] = types.MappingProxyType({
    "prepare": "any image source -> pixel store; fits or imports a palette",
    "pretrain": "autoregressive or masked (BERT) pretraining, sharded; resumes where it stopped",
    "finetune": "trains a checkpoint, or a new model, to classify as well: the same loop on labelled images",
    "evaluate": "exact nats per pixel of one or many checkpoints over a whole split; can follow a run",
    "probe": "a linear classifier on the features of every layer: accuracy by depth",
    "sample": "unconditional samples, and completions of given pictures",
    "plan": "compiles the very step for a TPU or GPU topology that is not there: fits? how fast? which mesh?",
    "convert": "weights of OpenAI and Hugging Face <-> our checkpoints, with a certificate",
    "verify": "holds checkpoints or a pixel store against their checksums",
    "report": "one self-contained HTML page from any set of workdirs",
})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    class_layer = -1  # not a key here: FinetuneModelConfig says what it is
    name: str = key("igpt_s", f"row of the model table: {', '.join(MODELS)}")
    layers: int = key(0, "blocks; 0: as in the model table")
    embed: int = key(0, "width of the residual stream; 0: as in the model table")
    heads: int = key(0, "attention heads; 0: as in the model table")
    mlp: int = key(0, "width of the MLP's hidden layer; 0: 4 x embed")
    init: str = key("released", "released: as OpenAI's code; paper: as Sparse Transformers (paper, Section 3.3)")
    dropout: float = key(0.0, "share of residual activations dropped while training; the paper uses none")
    attention: str = key("auto", f"back-end: {', '.join(ATTENTION_BACKENDS)}")
    remat: str = key("attention", "what the backward pass recomputes: none (nothing), dots (all but matrix products and"
                                  " what attention gives), attention (all but what attention gives), offload (as "
                                  "attention, which waits in the host's memory), full (each whole block)")
    unroll: int = key(1, "blocks in each turn of the loop over them; model.layers: no loop, longer to compile")

    def __post_init__(self):
        _one_of("model.name", self.name, list(MODELS))
        _one_of("model.init", self.init, ["released", "paper"])
        _one_of("model.attention", self.attention, ATTENTION_BACKENDS)
        _one_of("model.remat", self.remat, REMAT_POLICIES)
        _require(self.unroll >= 1, f"model.unroll={self.unroll} must be at least 1.")
        _require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must lie in [0, 1).")
        for name, row in zip(("layers", "embed", "heads"), MODELS[self.name], strict=True):
            size = getattr(self, name)
            _require(size >= 0, f"model.{name}={size} must be positive, or 0 for the model table's.")
            object.__setattr__(self, name, size or row)
        _require(self.mlp >= 0, f"model.mlp={self.mlp} must be positive, or 0 for 4 x model.embed.")
        object.__setattr__(self, "mlp", self.mlp or 4 * self.embed)
        _require(self.embed % self.heads == 0,
                 f"model.embed={self.embed} is not a multiple of model.heads={self.heads}. Choose a divisor.")


@dataclasses.dataclass(frozen=True)
class FinetuneModelConfig(ModelConfig):
    """The sizes of a checkpoint's model are its own: they are given to train from scratch."""
    name: str = key("", f"without a checkpoint: row of the model table: {', '.join(MODELS)}")
    class_layer: int = key(-1, "place in the stream that the class head reads, 0 (the embedding) to L; -1: the last")

    def __post_init__(self):
        if self.name:
            super().__post_init__()
            _require(-1 <= self.class_layer <= self.layers, f"model.class_layer={self.class_layer}: the model has "
                     f"places 0 (the embedding) to {self.layers}; -1 is the last.")
        else:
            given = [name for name in ("layers", "embed", "heads", "mlp") if getattr(self, name)]
            _require(not given, f"model.{given and given[0]} is set and model.name is not. Name a row of the model "
                                "table to train from scratch; a checkpoint brings its own sizes.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = key(0.003, "peak learning rate (quoted from the paper by others: 0.003 for S, 0.001 for "
                                      "L, 0.0003 for XL)")
    schedule: str = key("cosine", "after warm-up: cosine (towards 0 at the end) or constant")
    warmup_steps: int = key(-1, "steps of linear warm-up from 0; -1: one epoch, as in the paper")
    beta1: float = key(0.9, "Adam's decay of the first moment")
    beta2: float = key(0.95, "Adam's decay of the second moment (0.999 gave loss spikes in the paper)")
    second_moment: str = key("float32", "how Adam keeps its second moment: float32; bfloat16 (half the memory); "
                                        "factored (a row and a column per matrix, Shazeer and Stern 2018: nearly none)")
    epsilon: float = key(1e-8, "Adam's epsilon, added outside the root; the paper does not state one")
    weight_decay: float = key(0.0, "decoupled weight decay of matrices; the paper uses none")
    clip_norm: float = key(0.0, "global gradient norm above which gradients are scaled down; 0: off, as in the paper")

    spike_factor: float = key(0.0, "gradient norm, in multiples of its running mean, above which an update is skipped "
                                   "as a non-finite one is; 0: off, as in the paper")

    def __post_init__(self):
        _one_of("optimizer.schedule", self.schedule, ["cosine", "constant"])
        _one_of("optimizer.second_moment", self.second_moment, SECOND_MOMENTS)
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive.")
        _require(self.warmup_steps >= -1, f"optimizer.warmup_steps={self.warmup_steps} must be -1 (one epoch) or more.")
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
                 f"optimizer.beta1={self.beta1} and optimizer.beta2={self.beta2} must lie in [0, 1).")
        for name in ("epsilon", "weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative.")
        _require(self.spike_factor == 0 or self.spike_factor > 1,
                 f"optimizer.spike_factor={self.spike_factor} must exceed 1, or be 0 to skip no spikes.")


@dataclasses.dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    learning_rate: float = key(0.0003, "peak learning rate (paper: best at about a tenth of pretraining's)")
    schedule: str = key("constant", "after warm-up: constant (paper), or cosine (towards 0 at the end)")
    warmup_steps: int = key(0, "steps of linear warm-up from 0; -1: one epoch")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The named mesh axes. Their sizes multiply to the number of devices; one of them may be -1: all that is left."""
    data: int = key(1, "copies of the state; the batch is split over data x fsdp")
    fsdp: int = key(-1, "devices that share one copy of the state (fully sharded data parallel)")
    tensor: int = key(1, "devices that share each layer's heads and MLP")
    context: int = key(1, "devices that share each sequence; they share one copy of the state too")

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name}={size} must be positive, or -1 for all devices left.")
        _require(list(sizes.values()).count(-1) <= 1, f"mesh={sizes}: only one axis may be -1.")

    def resolve(self, devices: int) -> "MeshConfig":
        """The mesh with -1 replaced, for `devices` devices. Raises UserError where the sizes do not multiply to it."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        filled = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
        typed = " x ".join(f"{name}={size}" for name, size in sizes.items())
        _require(math.prod(filled.values()) == devices,
                 f"mesh {typed} does not multiply to the {devices} devices here. "
                 f"Set mesh.fsdp=-1 to use all that are left, with axes that divide {devices}.")
        return MeshConfig(**filled)


@dataclasses.dataclass(frozen=True)
class SampleMeshConfig(MeshConfig):
    """By default every device has the weights: split over fsdp they would be gathered for every pixel."""
    data: int = key(-1, "copies of the weights; the batch is split over data x fsdp")
    fsdp: int = key(1, "devices that share one copy of the weights, which is gathered for every pixel: slow")


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    store: str = key("", "pixel store; empty: the one that the checkpoint was trained on")
    split: str = key("held_out", "split of it; several joined with +")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    store: str = key("", "pixel store: a workdir of the prepare job (a local path, gs:// or s3://); several, split by "
                         "commas: a mixture; tfds:NAME[@SPLIT]: pictures in ArrayRecord files, read by index")
    weights: tuple[int, ...] = key((), "of a mixture: images taken of each store in turn; empty: one of each")
    split: str = key("train", "split to train on; several joined with +")
    held_out: str = key("held_out", "split to evaluate on while training; empty: none")
    augment: str = key("none", "none; cifar: reflect-pad 4, random crop, mirror; imagenet (of tfds): shorter side 256 "
                               "to 384, random 224 crop (paper, Section 3.1)")
    reader: str = key("auto", "tfdata: stream from the store; resident: hold all tokens in memory (no TensorFlow);"
                              " auto: resident up to 256 MiB of tokens")
    stage: str = key("", "folder of this machine to copy the store to first, once; empty: read it where it is")
    window: int = key(0, "of a store with chunk > 1: chunks whose images are shuffled together; 0: 1024")
    prefetch: int = key(4, "batches read ahead")

    def __post_init__(self):
        _one_of("data.reader", self.reader, ["auto", "tfdata", "resident"])
        _one_of("data.augment", self.augment, ["none", "cifar", "imagenet"])
        _require(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be at least 1.")
        _require(self.window >= 0, f"data.window={self.window} must not be negative.")
        _require(all(1 <= weight <= 10_000 for weight in self.weights),
                 f"data.weights={self.weights}: weights are whole numbers from 1 to 10,000, such as (1,3).")
        seen = set(self.split.split("+")) & set(self.held_out.split("+"))
        _require(not seen, f"data.held_out={self.held_out} is also trained on (data.split={self.split}). "
                           "Evaluate on another split, or on none with --config.data.held_out=")


@dataclasses.dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    store: str = key("", "labelled pixel store, or whatever else pretrain takes; empty: the one that the checkpoint "
                         "was trained on")
    split: str = key("train", "split to train on; train+held_out once the steps are chosen (paper, Section 3.1)")
    test: str = key("test", "split of the reported accuracy; empty: none")


def _check_job(config: Any) -> None:
    """The rules that hold for any job that has the key."""
    for name in ("steps", "batch_size", "accumulate", "log_every_steps", "keep_newest", "max_skipped_updates"):
        value = getattr(config, name, 1)
        chosen_by_job = name == "batch_size" and value == 0 and config.job == "sample"
        _require(value >= 1 or chosen_by_job, f"{name}={value} must be at least 1.")
    for name in ("image_size", "checkpoint_every_steps", "eval_every_steps", "limit", "stall_seconds",
                 "compare_replicas_every_steps", "images_per_pass", "surprise", "idle_seconds"):
        value = getattr(config, name, 0)
        _require(value >= 0, f"{name}={value} must not be negative.")
    seed = getattr(config, "seed", 0)
    _require(0 <= seed < 2**32, f"seed={seed} must lie in [0, 2^32).")
    _one_of("precision", getattr(config, "precision", "float32"), PRECISIONS)
    profile = getattr(config, "profile", ())
    _require(not profile or len(profile) == 2 and 1 <= profile[0] <= profile[1],
             f"profile={profile} must be a first and a last step, such as (100,105), or empty.")
    for step in getattr(config, "keep_steps", ()):
        _require(step > 0, f"keep_steps: {step} must be a positive number of steps.")


def _slice_of(shard: str) -> tuple[int, int]:
    """(i, n) of a key `shard`; (0, 1) for all and for merge."""
    if shard in ("", "merge"):
        return 0, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    _require(bool(found), f"shard={shard!r} must read i/n, such as 0/16, or merge.")
    i, n = int(found[1]), int(found[2])
    _require(0 <= i < n, f"shard={shard!r}: slices are 0/n to n-1/n.")
    return i, n


def _check_sampling(prefix: str, config: Any) -> None:
    _require(config.temperature >= 0, f"{prefix}temperature={config.temperature} must not be negative.")
    _require(0 < config.top_p <= 1, f"{prefix}top_p={config.top_p} must lie in (0, 1].")
    _require(config.top_k >= 0, f"{prefix}top_k={config.top_k} must not be negative.")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    job: str = key("prepare", "the job that this configuration is for")
    source: str = key("digits", "training images: digits[:train|:test] | synthetic[:COUNT] | npz:PATH | folder:PATH | "
                                "tar:PATH | tfds:NAME[@SPLIT] (PATH of npz and tar: a glob); store:PATH fits a palette "
                                "only")
    test_source: str = key("", "test images, same syntax; empty: no test split")
    image_size: int = key(0, "height and width of the stored images, pixels; 0: the source's own")
    palette: str = key("", "fit:K (k-means, K colours), or a palette's .npy; empty: fit:17 for digits, else fit:512")
    held_out: float = key(0.1, "share of the training images held out (paper: 0.04 for ImageNet, 0.1 for others)")
    max_quarantined: float = key(0.001, "share of the images that may be unusable before the job refuses")
    shard: str = key("", "i/n: only slice i of n, from 0; merge: joins the slices in the workdir's folders; empty: all")
    chunk: int = key(0, "images read together; 0: 1 on a local disk, 64 in a bucket")
    workers: int = key(0, "threads that decode; 0: one per core")
    seed: int = key(0, "chooses the held-out images and the palette's start")

    def __post_init__(self):
        _check_job(self)
        _require(0 <= self.held_out < 1, f"held_out={self.held_out} must lie in [0, 1).")
        _require(0 <= self.max_quarantined <= 1, f"max_quarantined={self.max_quarantined} must lie in [0, 1].")
        for name in ("chunk", "workers"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        _slice_of(self.shard)

    @property
    def slice(self) -> tuple[int, int]:
        """(i, n) of `shard`; (0, 1) for all and for merge."""
        return _slice_of(self.shard)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    checkpoint, generative_weight, class_weight, patience = "", 1.0, 0.0, 0  # not keys here: FinetuneConfig's

    job: str = key("pretrain", "the job that this configuration is for")
    objective: str = key("autoregressive", "autoregressive: each pixel from those before it; masked: hidden pixels "
                                           "from all others (BERT)")
    masked_share: float = key(0.15, "masked: share of pixels hidden, chosen anew in each step (paper: 0.15)")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    mesh: MeshConfig = section(MeshConfig)
    image_size: int = key(0, "height and width, pixels; 0: the store's (others are refused: prepare resizes)")
    palette: str = key("", "a palette's .npy; empty: the store's own")
    steps: int = key(1_000_000, "optimizer steps (paper: 1M; 2M for XL)")
    batch_size: int = key(128, "images per step over all devices (paper: 128; 64 for XL)")
    images_per_pass: int = key(0, "images that one device takes at once: a step accumulates as many parts as "
                                  "that takes, so that a run can go on with fewer devices; 0: as accumulate says")
    accumulate: int = key(1, "parts that a step computes one after the other: memory of batch_size / accumulate images")
    seed: int = key(0, "chooses initial weights, data order and dropout")
    precision: str = key("bfloat16", "of activations and matrix products (parameters are float32): bfloat16 or float32;"
                                     " float64: everything, for tests")
    max_skipped_updates: int = key(20, "updates in a row skipped for a loss or gradient that is not finite or spikes, "
                                       "then the run stops as diverged (exit code 77)")
    skip_divergence: bool = key(False, "after exit code 77: go on from the newest checkpoint with the examples after "
                                       "those that the run diverged on")
    accept_changes: tuple[str, ...] = key((), "keys (also palette, data) in which this run may differ from its "
                                              "checkpoint; recorded in the next ones")
    stall_seconds: float = key(1800.0, "seconds without a finished step, evaluated batch or save before the run ends "
                                       "as stuck (exit code 76); compilation does not count; 0: never")
    compare_replicas_every_steps: int = key(0, "steps between comparisons of what several devices hold copies of, "
                                               "also before each save; 0: never")
    replay_check: bool = key(False, "on resume, repeat steps of the log from a checkpoint before and compare the loss")
    profile: tuple[int, ...] = key((), "first and last step to trace, such as (100,105); empty: none")
    log_every_steps: int = key(50, "steps between metrics lines")
    wandb: str = key("", "Weights & Biases project that gets the metrics too: PROJECT or ENTITY/PROJECT; empty: none")
    eval_every_steps: int = key(5000, "steps between evaluations of data.held_out, each saved too; 0: only at the end")
    checkpoint_every_steps: int = key(1000, "steps between checkpoints; 0: only at the end")
    keep_newest: int = key(2, "newest checkpoints kept; the best by held-out loss is kept besides")
    keep_steps: tuple[int, ...] = key((65536, 131072, 262144, 524288, 1000000),
                                      "steps whose checkpoints are saved and never deleted (paper, Figure 3)")

    def __post_init__(self):
        _check_job(self)
        _one_of("objective", self.objective, OBJECTIVES)
        _require(0 < self.masked_share < 1, f"masked_share={self.masked_share} must lie in (0, 1).")
        _require(bool(re.fullmatch(r"([^/\s]+/)?[^/\s]+|", self.wandb)),
                 f"wandb={self.wandb!r} must read PROJECT or ENTITY/PROJECT.")
        _require(self.objective == "masked" or self.masked_share == PretrainConfig.masked_share,
                 f"masked_share={self.masked_share} has no effect on objective={self.objective}. Set objective=masked.")

    @property
    def hidden_share(self) -> float:
        """The share of pixels that training hides; 0: none, the objective is autoregressive."""
        return self.masked_share if self.objective == "masked" else 0.0


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Pretrain's keys, with other defaults, and what the labels add."""
    job: str = key("finetune", "the job that this configuration is for")
    checkpoint: str = key("", "a workdir of pretrain or one step of it (DIR/checkpoints/STEP); empty: a new model, "
                              "model.name")
    generative_weight: float = key(1.0, "of the pixels' loss, that of the objective; 0: classification alone")
    class_weight: float = key(1.0, "of the classes' loss (paper: both 1)")
    patience: int = key(0, "evaluations without a better held-out accuracy after which the run ends; 0: never")
    data: FinetuneDataConfig = section(FinetuneDataConfig)
    model: FinetuneModelConfig = section(FinetuneModelConfig)
    optimizer: FinetuneOptimizerConfig = section(FinetuneOptimizerConfig)
    palette: str = key("", "of a new model: a palette's .npy; empty: the store's own. A checkpoint brings its own")
    objective: str = key("autoregressive", "that of the checkpoint: autoregressive or masked (BERT)")
    masked_share: float = key(0.15, "masked: share of pixels hidden, in evaluation too")
    steps: int = key(10_000, "optimizer steps, at most")
    eval_every_steps: int = key(500, "steps between evaluations of data.held_out, each saved too; 0: only at the end")
    keep_steps: tuple[int, ...] = key((), "steps whose checkpoints are saved and never deleted")

    def __post_init__(self):
        super().__post_init__()
        _require(self.generative_weight >= 0, f"generative_weight={self.generative_weight} must not be negative.")
        _require(self.class_weight > 0, f"class_weight={self.class_weight} must be positive: without it, pretrain.")
        _require(self.patience >= 0, f"patience={self.patience} must not be negative.")
        _require(self.patience == 0 or bool(self.data.held_out) and self.eval_every_steps > 0,
                 f"patience={self.patience} waits for evaluations of held-out images, and there are none. Set "
                 "data.held_out and eval_every_steps, or leave patience=0.")


@dataclasses.dataclass(frozen=True)
class ProbeDataConfig:
    store: str = key("", "labelled pixel store; empty: the one that the checkpoint was trained on")
    train: str = key("train", "split to fit on")
    held_out: str = key("held_out", "split to choose the layer and the penalty by; the final probes are fit on both")
    test: str = key("test", "split of the reported accuracies")

    @property
    def splits(self) -> tuple[str, str, str]:
        return self.train, self.held_out, self.test


@dataclasses.dataclass(frozen=True)
class ProbingConfig:
    """How a probe is fit: keys of probe, and of evaluate's `probing`."""
    data: ProbeDataConfig = section(ProbeDataConfig)
    limit: int = key(0, "examples used of each split, from the first on; 0: all")
    features: str = key("normalized", "normalized: means of the stream after the next norm, as the paper's; residual: "
                                      "of the stream itself")
    layers: tuple[int, ...] = key((), "places in the stream to probe, 0 (the embedding) to L; empty: all")
    solver: str = key("lbfgs", "lbfgs: to the optimum; sgd: in batches, for sets of ImageNet's size")
    strengths: tuple[float, ...] = key((1e-4, 1e-3, 1e-2, 1e-1), "lbfgs: L2 penalties tried, on standardised features")
    rates: tuple[float, ...] = key((30.0, 10.0, 3.0, 1.0, 0.3, 0.1), "sgd: learning rates tried (paper: from 30 down)")
    steps: int = key(10_000, "sgd: steps (paper: 1M)")
    seed: int = key(0, "chooses the order of SGD; in the probe job also the untrained model and the low-data labels")

    def __post_init__(self):
        _check_job(self)
        _one_of("features", self.features, ["normalized", "residual"])
        _one_of("solver", self.solver, ["lbfgs", "sgd"])
        for name in ("strengths", "rates"):
            values = getattr(self, name)
            _require(values and all(value > 0 for value in values), f"{name}={values} must be positive numbers.")


@dataclasses.dataclass(frozen=True)
class ProbeConfig(ProbingConfig):
    job: str = key("probe", "the job that this configuration is for")
    checkpoint: str = key("", "a workdir of pretrain, or one step of it (DIR/checkpoints/STEP)")
    objective: str = key("autoregressive", "that of the checkpoint: autoregressive or masked (BERT)")
    mesh: MeshConfig = section(MeshConfig)
    concatenate: int = key(1, "neighbouring layers around the best one to probe together (paper: 5 for XL); 1: none")
    labels_per_class: tuple[int, ...] = key((), "low-data rows: labels of each class used (paper: 4, 25, 400)")
    draws: int = key(5, "low-data rows: random draws of the labels")
    baselines: bool = key(True, "also probe the raw pixels, and the same model untrained")
    batch_size: int = key(128, "images per step over all devices; any size gives the same features")
    precision: str = key("float32", "of activations and matrix products: bfloat16 or float32")
    attention: str = key("auto", f"back-end: {', '.join(ATTENTION_BACKENDS)}")

    def __post_init__(self):
        super().__post_init__()
        _one_of("objective", self.objective, OBJECTIVES)
        _require(all(count >= 1 for count in self.labels_per_class),
                 f"labels_per_class={self.labels_per_class} must be positive numbers.")
        _require(self.concatenate >= 1 and self.concatenate % 2 == 1,
                 f"concatenate={self.concatenate} must be odd: the best layer and as many on each side.")
        _require(self.draws >= 1, f"draws={self.draws} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    job: str = key("evaluate", "the job that this configuration is for")
    checkpoints: str = key("", "workdirs of pretrain, or steps of one (DIR/checkpoints/STEP): comma list or glob")
    watch: bool = key(False, "follow the runs: every step that appears, once, until the runs are done")
    idle_seconds: float = key(7200.0, "watch: seconds without a new checkpoint before it ends; 0: never")
    poll_seconds: float = key(10.0, "watch: seconds between two looks")
    shard: str = key("", "i/n: only slice i of n of the checkpoints, from 0; merge: joins the tables in the workdir's "
                         "folders; empty: all")
    data: SplitConfig = section(SplitConfig)
    tokens: str = key("", "in place of data: an .npy of tokens [n, T], such as OpenAI's imagenet_teX.npy")
    limit: int = key(0, "examples counted, from the first on; 0: all (OpenAI's figures count 49984)")
    surprise: int = key(0, "pictures to draw with the nats of each pixel; above 0 also nats by position and by class")
    probe: bool = key(False, "also probe each checkpoint, as the probe job does")
    probing: ProbingConfig = section(ProbingConfig)
    mesh: MeshConfig = section(MeshConfig)
    batch_size: int = key(128, "images per step over all devices; any size gives the same figures")
    precision: str = key("float32", "of activations and matrix products: bfloat16 or float32")
    attention: str = key("auto", f"back-end: {', '.join(ATTENTION_BACKENDS)}")

    def __post_init__(self):
        _check_job(self)
        _require(self.poll_seconds > 0, f"poll_seconds={self.poll_seconds} must be positive.")
        _slice_of(self.shard)

    @property
    def slice(self) -> tuple[int, int]:
        """(i, n) of `shard`; (0, 1) for all and for merge."""
        return _slice_of(self.shard)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    job: str = key("sample", "the job that this configuration is for")
    checkpoint: str = key("", "a workdir of pretrain, or one step of it (DIR/checkpoints/STEP)")
    data: SplitConfig = section(SplitConfig)
    mesh: SampleMeshConfig = section(SampleMeshConfig)
    images: str = key("", "pictures of yours to complete: a folder, a file or a glob (JPEG, PNG, WebP)")
    examples: int = key(-1, "images of data.split to complete; -1: 16, or none with `images` or without a store")
    count: int = key(-1, "unconditional samples; -1: 64, or none with `images`")
    rows: int = key(-1, "rows given of each image to complete; -1: the upper half")
    completions: int = key(4, "completions of each image")
    temperature: float = key(1.0, "divides the logits; 0: the most likely colour always")
    top_k: int = key(0, "sample from the k most likely colours; 0: all")
    top_p: float = key(1.0, "sample from the most likely colours that hold this share of the probability")
    batch_size: int = key(0, "images drawn at once over all devices; any size gives the same samples; "
                             "0: 16 on CPU, 64 elsewhere")
    seed: int = key(0, "each sample's stream is the seed folded with its image's index and its own")
    precision: str = key("float32", "of activations and matrix products: bfloat16 or float32")
    cache_dtype: str = key("", "of cached keys and values: bfloat16 or float32; empty: the precision")

    def __post_init__(self):
        _check_job(self)
        _check_sampling("", self)
        _one_of("cache_dtype", self.cache_dtype or self.precision, PRECISIONS)
        for name, least in (("count", -1), ("examples", -1), ("batch_size", 0)):
            _require(getattr(self, name) >= least, f"{name}={getattr(self, name)} must be {least} or more.")
        _require(self.completions >= 1, f"completions={self.completions} must be at least 1.")
        _require(self.rows >= -1, f"rows={self.rows} must be -1 (the upper half) or more.")


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    job: str = key("verify", "the job that this configuration is for")
    path: str = key("", "a pixel store, a workdir of pretrain or finetune, or one step of it (DIR/checkpoints/STEP)")

    def __post_init__(self):
        _check_job(self)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    job: str = key("report", "the job that this configuration is for")
    workdirs: str = key("", "workdirs of jobs: comma list, globs too ('runs/*')")

    def __post_init__(self):
        _check_job(self)


@dataclasses.dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Pretrain's keys, which decide its step, and what to compile it for. Keys of reading and saving have no effect."""
    job: str = key("plan", "the job that this configuration is for")
    image_size: int = key(32, "height and width, pixels")
    topology: str = key("attached", "v4:4x4x4, v5e:16x16, v5e:16x16*4 (slices), v5p:4x4x8, v6e:16x16, a100:8, h100:8, "
                                    "h100:8x4 (nodes), h200:8, cpu:8; attached: this machine's devices")
    step: str = key("train", "what to compile: train, evaluate or sample (unconditionally; batch_size images at once)")
    palette_size: int = key(512, "colours")
    search: bool = key(False, "look for the fastest mesh, accumulate, model.remat and model.attention that fit")
    search_compiles: int = key(4, "most promising candidates that the search compiles")
    python: str = key("", "interpreter of an environment with jax[cuda13], for GPU topologies; empty: this one")
    roofline_share: float = key(0.6, "share of the roofline's speed that runs are taken to reach until calibrated; "
                                     "public transformers of these sizes report 0.35 to 0.7")
    calibration: str = key("", "finished pretrain workdirs on the same kind of device: comma list or glob; their speed "
                               "replaces roofline_share")
    dollars_per_device_hour: float = key(-1.0, "price; -1: the list price in topology.py")
    save_gigabytes_per_second: float = key(5.0, "what all hosts together write to storage")
    failures_per_1000_device_days: float = key(0.5, "unexpected interruptions (Llama 3 on 16,384 GPUs: 0.47)")

    def __post_init__(self):
        super().__post_init__()
        _one_of("step", self.step, ["train", "evaluate", "sample"])
        for name in ("image_size", "palette_size", "search_compiles"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("roofline_share", "save_gigabytes_per_second", "failures_per_1000_device_days"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    rows: int = key(0, "rows that the exported sampler is given of each picture")
    temperature: float = key(1.0, "as the sample job's")
    top_k: int = key(0, "as the sample job's")
    top_p: float = key(1.0, "as the sample job's")
    probe: str = key("", "a workdir of the probe job: exports the best layer's classifier too; empty: none")
    platforms: tuple[str, ...] = key(("cpu", "cuda", "tpu"), "where the programs run")

    def __post_init__(self):
        _check_sampling("export.", self)
        _require(self.rows >= 0, f"export.rows={self.rows} must not be negative.")
        for platform in self.platforms:
            _one_of("export.platforms", platform, ["cpu", "cuda", "rocm", "tpu"])
        _require(bool(self.platforms), "export.platforms is empty. Name at least one: ('cpu',)")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    job: str = key("convert", "the job that this configuration is for")
    convert_from: str = key("", "openai:PREFIX (DIR/model.ckpt-1000000) | huggingface:DIR | orbax:DIR (a workdir of "
                                "pretrain, or one step of it)")
    convert_to: str = key("", "the same kinds, or export:DIR (programs that run where only jax is installed); "
                              "empty: orbax:WORKDIR, which other jobs take as their checkpoint")
    palette: str = key("", "a palette's .npy, where the weights come without one, as OpenAI's do; empty: theirs")
    head: str = key("pixels", "which model of transformers is written: pixels (ImageGPTForCausalImageModeling) or "
                              "classes (ImageGPTForImageClassification)")
    certificate: str = key("full", "full: hashes of all tensors, and logits of both sides (both models in memory); "
                                   "hashes: without logits")
    export: ExportConfig = section(ExportConfig)

    def __post_init__(self):
        _one_of("head", self.head, ["pixels", "classes"])
        _one_of("certificate", self.certificate, ["full", "hashes"])


JOB_CONFIGS = {"prepare": PrepareConfig, "pretrain": PretrainConfig, "finetune": FinetuneConfig,
               "evaluate": EvaluateConfig, "probe": ProbeConfig, "sample": SampleConfig, "plan": PlanConfig,
               "convert": ConvertConfig, "verify": VerifyConfig, "report": ReportConfig}


def to_dict(config: Any) -> dict[str, Any]:
    """A job's dataclass as nested plain dicts, for config.json and checkpoints."""
    return dataclasses.asdict(config)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _unresolved(cls: type) -> dict[str, Any]:
    """Defaults as declared, before __post_init__ fills any in."""
    return {field.name: _unresolved(field.type) if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(cls)}


def base_config(job: str = "pretrain", arguments: str = "") -> ml_collections.ConfigDict:
    """The locked ConfigDict of `job`'s keys with the paper's defaults.

    Args:
      job: name of a job.
      arguments: what follows the colon in `--config=FILE:key=value,key=value`; `model` stands for `model.name`.

    Raises:
      UserError: an unknown job or key, or a value of the wrong type.
    """
    if job not in JOB_CONFIGS:
        raise UserError(f"job {job!r} is not known. {nearest(job, list(JOB_CONFIGS))}")
    config = ml_collections.ConfigDict(_unresolved(JOB_CONFIGS[job])).lock()
    return override(config, arguments)


def override(config: ml_collections.ConfigDict, arguments: str) -> ml_collections.ConfigDict:
    """Sets `key=value,key=value` in a base config, which it also returns; `base_config` says more."""
    for argument in filter(None, re.split(r",(?![^()]*\))", arguments or "")):  # a tuple's commas stay with it
        name, equals, text = argument.partition("=")
        _require(bool(equals), f"config argument {argument!r} must read key=value.")
        _set(config, "model.name" if name == "model" else name, text)
    return config


def _set(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    *path, last = name.split(".")
    parent: Any = config
    for part in (*path, last):
        if not isinstance(parent, ml_collections.ConfigDict) or part not in parent:
            raise UserError(f"config key {name!r} is not known. {nearest(name, [n for n, *_ in keys(config.job)])}")
        parent = parent if part is last else parent[part]
    default = parent[last]
    if isinstance(default, ml_collections.ConfigDict):
        raise UserError(f"config key {name!r} is a group. Set one of {', '.join(f'{name}.{key}' for key in default)}.")
    value: Any = text
    if not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    parent[last] = _typed(name, value, type(default))  # `parse` looks at the elements of tuples


def _typed(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind`, the declared type of a key: float takes integers too, and must be finite. Raises UserError."""
    outer, elements = typing.get_origin(kind) or kind, typing.get_args(kind)
    if outer is tuple and type(value) in (tuple, list):
        return tuple(_typed(f"{name}[{i}]", element, elements[0]) if elements else element
                     for i, element in enumerate(value))
    if outer is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    _require(type(value) is outer, f"config key {name}={value!r} must be of type {outer.__name__}.")
    _require(outer is not float or math.isfinite(value), f"config key {name}={value!r} must be finite.")
    _require(outer is not int or abs(value) < 2**63, f"config key {name}={value!r} must lie below 2^63.")
    return value


def keys(job: str) -> Iterator[tuple[str, Any, str]]:
    """Each key of a job as (dotted name, default, meaning with unit)."""
    def walk(cls: type, defaults: Mapping[str, Any], prefix: str):
        for field in dataclasses.fields(cls):
            if "doc" in field.metadata:
                yield prefix + field.name, defaults[field.name], field.metadata["doc"]
            else:
                yield from walk(field.type, defaults[field.name], f"{prefix}{field.name}.")
    return walk(JOB_CONFIGS[job], _unresolved(JOB_CONFIGS[job]), "")


def parse(job: str, config: Mapping[str, Any]) -> Any:
    """The validated dataclass of `job` from a ConfigDict or a config.json's dict.

    Raises:
      UserError: an unknown key (with the nearest known one), a value outside its range, another job's config.
    """
    given = config.get("job", job)
    if given != job:
        raise UserError(f"this config is for the job {given!r}, not {job!r}: pass it to `igpt_jax {given}`.")

    def build(cls: type, values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Any:
        types_of = {field.name: field.type for field in dataclasses.fields(cls)}
        built = {}
        for name, value in values.items():
            if name not in defaults:
                raise UserError(f"config key {prefix + name!r} is not known. {nearest(name, list(defaults))}")
            if isinstance(defaults[name], Mapping):
                _require(isinstance(value, Mapping), f"config key {prefix}{name}={value!r} must be a group of keys.")
                built[name] = build(types_of[name], value, defaults[name], f"{prefix}{name}.")
            else:
                built[name] = _typed(prefix + name, value, types_of[name])
        return cls(**built)

    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return build(JOB_CONFIGS[job], values, _unresolved(JOB_CONFIGS[job]), "")
