"""Keys of the evaluate, probe and sample jobs."""

import dataclasses
import re
from typing import ClassVar

from igpt_jax.config.data import ProbeDataConfig, SplitConfig
from igpt_jax.config.keys import (
    PRECISIONS,
    Keys,
    at_least,
    compiler_options_key,
    key,
    one_of,
    positive,
    require,
    section,
    seed_range,
    shard_syntax,
    slice_of,
    within,
)
from igpt_jax.config.model import ATTENTION_BACKENDS, OBJECTIVES
from igpt_jax.config.training import PARAMETERS, MeshConfig, SampleMeshConfig

COMPLETION_MEASURES = ("random_conv_frechet", "checkpoint_frechet", "function_frechet")
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # MODULE:FUNCTION


def all_positive(name: str, values: tuple[float, ...]) -> None:
    """At least one number, all positive."""
    require(bool(values) and all(value > 0 for value in values), f"{name}={values} must be positive numbers.")


@dataclasses.dataclass(frozen=True)
class ProbingConfig(Keys):
    """Keys of fitting a probe: those of the probe job, and `probing` of other jobs."""
    group: ClassVar[str] = "probing."
    data: ProbeDataConfig = section(ProbeDataConfig)
    limit: int = key(0, "number of examples of each split, from the first; 0: all", resume="same", rule=at_least(0))
    features: str = key("normalized", "normalized: means over the tokens after the next norm, as in the paper; "
                                      "residual: means of the residual stream itself",
                        resume="same", rule=one_of("normalized", "residual"))
    layers: tuple[int, ...] = key((), "layers to probe, 0 (the embedding) to L; empty: all",
                                  resume="same")
    solver: str = key("lbfgs", "lbfgs: solved to the optimum; sgd: in batches, for data of ImageNet's size",
                      resume="same", rule=one_of("lbfgs", "sgd"))
    l2: tuple[float, ...] = key((1e-4, 1e-3, 1e-2, 1e-1), "lbfgs: L2 penalties to try, on standardized features",
                                resume="same", rule=all_positive, alias="strengths")
    rates: tuple[float, ...] = key((30.0, 10.0, 3.0, 1.0, 0.3, 0.1), "sgd: learning rates to try (paper: from 30 down)",
                                   resume="same", rule=all_positive)
    steps: int = key(10_000, "sgd, and attention-pooled probes: steps (paper: 1M)", resume="same", rule=at_least(1))
    seed: int = key(0, "seed of the order of SGD; in the probe job also of the untrained model and low-data labels",
                    resume="same", rule=seed_range)

    def __post_init__(self):
        super().__post_init__()
        for name, solver in (("l2", "lbfgs"), ("rates", "sgd"), ("steps", "sgd")):
            if self.solver != solver and name not in self._used_by_others():
                self.refuse_given(name, why=f"on {self.group}solver={self.solver}. Leave it out, or set "
                                            f"{self.group}solver={solver}.")

    def _used_by_others(self) -> set[str]:
        """The solvers' keys that other probes use too."""
        return set()


@dataclasses.dataclass(frozen=True)
class ProbeConfig(ProbingConfig):
    group: ClassVar[str] = ""
    job: str = key("probe", "the job that this configuration is for", resume="same")
    checkpoint: str = key("", "a workdir of pretrain, or one step of it (DIR/checkpoints/STEP)", resume="same")
    parameters: str = key("raw", "parameters of the checkpoint: raw, or ema (their moving average)", resume="same",
                          rule=one_of(*PARAMETERS))
    objective: str = key("autoregressive", "objective of the checkpoint: autoregressive, masked (BERT), denoising or "
                                           "diffusion", resume="same", rule=one_of(*OBJECTIVES))
    kind: str = key("linear", "probes to fit beside the linear ones. linear: none; knn: k nearest neighbors, of every "
                              "layer; attention: attention pooling over the tokens of the best layer",
                    resume="same", rule=one_of("linear", "knn", "attention"))
    attention_rates: tuple[float, ...] = key((3e-2, 1e-2, 3e-3, 1e-3, 3e-4), "attention: peak learning rates of AdamW "
                                                                                  "to try", resume="same",
                                             rule=all_positive)
    mesh: MeshConfig = section(MeshConfig)
    concatenate: int = key(1, "layers around the best one whose features are concatenated (paper: 5 for XL); 1: none",
                           resume="same")
    labels_per_class: tuple[int, ...] = key((), "low-data probes: labels per class (paper: 4, 25, 400)",
                                            resume="same")
    draws: int = key(5, "low-data probes: random draws of the labels", resume="same", rule=at_least(1))
    baselines: bool = key(True, "also probe the raw pixels and an untrained copy of the model", resume="same")
    batch_size: int = key(128, "images per step over all devices; any size gives the same features", resume="free",
                          rule=at_least(1))
    precision: str = key("float32", "dtype of activations and matrix products: bfloat16 or float32", resume="same",
                         rule=one_of(*PRECISIONS))
    attention: str = key("auto", f"attention back-end: {', '.join(ATTENTION_BACKENDS)}", resume="free")
    compiler_options: str = compiler_options_key()

    def __post_init__(self):
        super().__post_init__()
        require(all(count >= 1 for count in self.labels_per_class),
                f"labels_per_class={self.labels_per_class} must be positive numbers.")
        require(self.concatenate >= 1 and self.concatenate % 2 == 1,
                f"concatenate={self.concatenate} must be odd: the best layer and as many on each side. Use 1, 3 or 5.")
        if self.kind != "attention":
            self.refuse_given("attention_rates", why=f"on kind={self.kind}. Set kind=attention.")
        if not self.labels_per_class:
            self.refuse_given("draws", why="without labels_per_class. Set labels_per_class, such as (4,25).")

    def _used_by_others(self) -> set[str]:
        low_data, attention = ("l2", self.labels_per_class), ("steps", self.kind == "attention")
        return {name for name, used in (low_data, attention) if used}


@dataclasses.dataclass(frozen=True)
class CompletionKeys(Keys):
    """Keys of the completion score, of evaluate and of scaling."""
    completions: int = key(0, "completions of each image's upper half to score, by their Frechet distance to the "
                              "images; 0: none", resume="same", rule=at_least(0))
    completion_images: int = key(500, "number of images to complete, from the first", resume="same", rule=at_least(4))
    completion_features: str = key("random", "features of the distance: random (a fixed random network); a checkpoint "
                                             "(its middle layer); or your function, MODULE:FUNCTION, of uint8 "
                                             "[B, Y, X, 3] to float [B, F]", resume="same")

    @property
    def completion_measure(self) -> str:
        """The column of the distance, whose name tells the kind of features."""
        of_random, of_checkpoint, of_function = COMPLETION_MEASURES
        if self.completion_features == "random":
            return of_random
        return of_function if FUNCTION.fullmatch(self.completion_features) else of_checkpoint

    @property
    def without_effect(self) -> bool:
        """Whether keys of the score are set although it is off."""
        return not self.completions and any(getattr(self, field.name) != field.default
                                            for field in dataclasses.fields(CompletionKeys))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(CompletionKeys):
    job: str = key("evaluate", "the job that this configuration is for", resume="same")
    checkpoints: str = key("", "workdirs of pretrain, or steps of one (DIR/checkpoints/STEP): comma list or glob",
                           resume="free")
    parameters: str = key("raw", "parameters of the checkpoints: raw, or ema (their moving average)", resume="same",
                          rule=one_of(*PARAMETERS))
    watch: bool = key(False, "follow the runs: evaluate each new checkpoint once, until the runs are done",
                      resume="free")
    idle_seconds: float = key(7200.0, "watch: seconds without a new checkpoint before the job ends; 0: never",
                              resume="free", rule=at_least(0))
    poll_seconds: float = key(10.0, "watch: seconds between checks for new checkpoints", resume="free",
                              rule=positive)
    shard: str = key("", "i/n: only slice i of n of the checkpoints, from 0; merge: join the tables in the workdir's "
                         "folders; empty: all", resume="free", rule=shard_syntax)
    data: SplitConfig = section(SplitConfig)
    tokens: str = key("", "instead of data: an .npy of tokens [n, T], such as OpenAI's imagenet_teX.npy; empty: none",
                      resume="same")
    limit: int = key(0, "number of examples, from the first; 0: all (OpenAI's results are for 49984)", resume="same",
                     rule=at_least(0))
    views: int = key(5, "random views of each image, of models that hide pixels: votes for its class (paper: 5), or "
                        "those that a diffusion model's bound is the mean of", resume="same", rule=at_least(1))
    loss_maps: int = key(0, "per-pixel loss maps to draw; above 0, also the loss by position and by class",
                         resume="same", rule=at_least(0), alias="surprise")
    samples: int = key(0, "samples to draw from each checkpoint, and completions of as many examples, for the report",
                       resume="same", rule=at_least(0))
    probe: bool = key(False, "also probe each checkpoint, as the probe job does", resume="same")
    probing: ProbingConfig = section(ProbingConfig)
    mesh: MeshConfig = section(MeshConfig)
    batch_size: int = key(128, "images per step over all devices; any size gives the same figures", resume="free",
                          rule=at_least(1))
    precision: str = key("float32", "dtype of activations and matrix products: bfloat16 or float32", resume="same",
                         rule=one_of(*PRECISIONS))
    attention: str = key("auto", f"attention back-end: {', '.join(ATTENTION_BACKENDS)}", resume="free")
    compiler_options: str = compiler_options_key()

    def __post_init__(self):
        super().__post_init__()
        if not self.watch:
            self.refuse_given("idle_seconds", "poll_seconds", why="without watch. Set watch=True.")

    @property
    def slice(self) -> tuple[int, int]:
        """(i, n) of `shard`; (0, 1) if it is empty or `merge`."""
        return slice_of(self.shard)


@dataclasses.dataclass(frozen=True)
class SampleConfig(Keys):
    job: str = key("sample", "the job that this configuration is for", resume="free")
    checkpoint: str = key("", "a workdir of pretrain, or one step of it (DIR/checkpoints/STEP)", resume="free")
    parameters: str = key("raw", "parameters of the checkpoint: raw, or ema (their moving average)", resume="free",
                          rule=one_of(*PARAMETERS))
    data: SplitConfig = section(SplitConfig)
    mesh: SampleMeshConfig = section(SampleMeshConfig)
    images: str = key("", "your own images to complete: a folder, a file or a glob (JPEG, PNG, WebP); empty: none",
                      resume="free")
    examples: int = key(-1, "images of data.split to complete; -1: 16, or none with `images` or without a store",
                        resume="free")
    count: int = key(-1, "unconditional samples; -1: 64, or none with `images`", resume="free")
    rows: int = key(-1, "given rows of each image to complete; -1: the upper half", resume="free")
    completions: int = key(4, "completions per image", resume="free", rule=at_least(1))
    temperature: float = key(1.0, "divisor of the logits; 0: always the most likely color", resume="free",
                             rule=at_least(0))
    top_k: int = key(0, "number of most likely colors to sample from; 0: all of them", resume="free", rule=at_least(0))
    top_p: float = key(1.0, "nucleus sampling: sample from the fewest colors that together have this probability",
                       resume="free", rule=within(0, 1, "(]"))
    batch_size: int = key(0, "images sampled at once over all devices; any size gives the same samples; "
                             "0: 16 on CPU, 64 elsewhere", resume="free")
    seed: int = key(0, "seed; each sample's random stream also depends on its image's index and its own",
                    resume="free", rule=seed_range)
    precision: str = key("float32", "dtype of activations and matrix products: bfloat16 or float32", resume="free",
                         rule=one_of(*PRECISIONS))
    cache_dtype: str = key("", "dtype of cached keys and values: bfloat16 or float32; empty: precision, but "
                               "float32 in place of bfloat16 on CPUs", resume="free",
                           rule=one_of("", *PRECISIONS))
    compiler_options: str = compiler_options_key()

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("count", -1), ("examples", -1), ("batch_size", 0)):
            require(getattr(self, name) >= least, f"{name}={getattr(self, name)} must be {least} or more.")
        require(self.rows >= -1, f"rows={self.rows} must be -1 (the upper half) or more.")
        require(not (self.images and self.examples > 0),
                f"images and examples={self.examples} are both given, and only one is completed. Leave one out.")
        if self.images or self.examples == 0:
            self.data.refuse_given(why=f"with {'images' if self.images else 'examples=0'}. Leave it out.")
