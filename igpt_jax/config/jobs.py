"""The table of jobs, and the keys of plan, convert, verify and report."""

import dataclasses
import types
from collections.abc import Mapping
from typing import ClassVar

from igpt_jax.config.data import PrepareConfig
from igpt_jax.config.evaluation import EvaluateConfig, ProbeConfig, SampleConfig
from igpt_jax.config.keys import Keys, at_least, each, key, one_of, positive, require, section, within
from igpt_jax.config.training import FinetuneConfig, PretrainConfig

JOBS: Mapping[str, str] = types.MappingProxyType({
    "prepare": "any image source -> pixel store; fits or imports a palette",
    "pretrain": "autoregressive, masked (BERT) or denoising pretraining, sharded; resumes where it stopped",
    "finetune": "trains a checkpoint, or a new model, to classify as well: the same loop on labelled images",
    "evaluate": "exact nats per pixel of one or many checkpoints over a whole split; can follow a run",
    "probe": "a linear classifier on the features of every layer: accuracy by depth",
    "sample": "unconditional samples, and completions of given pictures",
    "plan": "compiles the very step for a TPU or GPU topology that is not there: fits? how fast? which mesh?",
    "convert": "weights of OpenAI and Hugging Face <-> our checkpoints, with a certificate",
    "verify": "checks checkpoints or a pixel store against their checksums",
    "report": "one self-contained HTML page from any set of workdirs",
})


@dataclasses.dataclass(frozen=True)
class VerifyConfig(Keys):
    job: str = key("verify", "the job that this configuration is for", resume="free")
    path: str = key("", "a pixel store, a workdir of pretrain or finetune, or one step of it (DIR/checkpoints/STEP)",
                    resume="free")


@dataclasses.dataclass(frozen=True)
class ReportConfig(Keys):
    job: str = key("report", "the job that this configuration is for", resume="free")
    workdirs: str = key("", "workdirs of jobs: comma list, globs too ('runs/*')", resume="free")


@dataclasses.dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Pretrain's keys, which decide its step, and what to compile it for. Keys of reading and saving have no effect."""
    job: str = key("plan", "the job that this configuration is for", resume="free")
    image_size: int = key(32, "height and width, pixels", resume="free", rule=at_least(1))
    topology: str = key("attached", "v4:4x4x4, v5e:16x16, v5e:16x16*4 (slices), v5p:4x4x8, v6e:16x16, a100:8, h100:8, "
                                    "h100:8x4 (nodes), h200:8, cpu:8; attached: this machine's devices", resume="free")
    step: str = key("train", "what to compile: train, evaluate or sample (unconditionally; batch_size images at once)",
                    resume="free", rule=one_of("train", "evaluate", "sample"))
    palette_size: int = key(512, "colors", resume="free", rule=at_least(1))
    search: bool = key(False, "look for the fastest mesh, accumulate, model.remat and model.attention that fit",
                       resume="free", compiled=False)
    search_compiles: int = key(4, "most promising candidates that the search compiles", resume="free",
                               rule=at_least(1), compiled=False)
    python: str = key("", "interpreter of an environment with jax[cuda13], for GPU topologies; empty: this one",
                      resume="free", compiled=False)
    roofline_share: float = key(0.6, "share of the roofline's speed that runs are taken to reach until calibrated; "
                                     "public transformers of these sizes report 0.35 to 0.7",
                                resume="free", rule=positive, compiled=False)
    calibration: str = key("", "finished pretrain workdirs on the same kind of device: comma list or glob; their speed "
                               "replaces roofline_share", resume="free", compiled=False)
    dollars_per_device_hour: float = key(-1.0, "price; -1: the list price in parallel/topology.py", resume="free",
                                         compiled=False)
    save_gigabytes_per_second: float = key(5.0, "rate at which all hosts together write to storage", resume="free",
                                           rule=positive, compiled=False)
    failures_per_1000_device_days: float = key(0.5, "unexpected interruptions (Llama 3 on 16,384 GPUs: 0.47)",
                                               resume="free", rule=positive, compiled=False)


@dataclasses.dataclass(frozen=True)
class ExportConfig(Keys):
    group: ClassVar[str] = "export."

    rows: int = key(0, "rows that the exported sampler is given of each picture", resume="free", rule=at_least(0))
    temperature: float = key(1.0, "as the sample job's", resume="free", rule=at_least(0))
    top_k: int = key(0, "as the sample job's", resume="free", rule=at_least(0))
    top_p: float = key(1.0, "as the sample job's", resume="free", rule=within(0, 1, "(]"))
    probe: str = key("", "a workdir of the probe job: exports the best layer's classifier too; empty: none",
                     resume="free")
    platforms: tuple[str, ...] = key(("cpu", "cuda", "tpu"), "where the programs run", resume="free",
                                     rule=each(one_of("cpu", "cuda", "rocm", "tpu")))

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.platforms), "export.platforms is empty. Name at least one: ('cpu',)")


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Keys):
    job: str = key("convert", "the job that this configuration is for", resume="free")
    convert_from: str = key("", "openai:PREFIX (DIR/model.ckpt-1000000) | huggingface:DIR | orbax:DIR (a workdir of "
                                "pretrain, or one step of it)", resume="free")
    convert_to: str = key("", "the same kinds, or export:DIR (programs that run where only jax is installed); "
                              "empty: orbax:WORKDIR, which other jobs take as their checkpoint", resume="free")
    palette: str = key("", "a palette's .npy, where the weights come without one, as OpenAI's do; empty: theirs",
                       resume="free")
    head: str = key("pixels", "which model of transformers is written: pixels (ImageGPTForCausalImageModeling) or "
                              "classes (ImageGPTForImageClassification)",
                    resume="free", rule=one_of("pixels", "classes"))
    certificate: str = key("full", "full: hashes of all tensors, and logits of both sides (both models in memory); "
                                   "hashes: without logits", resume="free", rule=one_of("full", "hashes"))
    export: ExportConfig = section(ExportConfig)


JOB_CONFIGS = {"prepare": PrepareConfig, "pretrain": PretrainConfig, "finetune": FinetuneConfig,
               "evaluate": EvaluateConfig, "probe": ProbeConfig, "sample": SampleConfig, "plan": PlanConfig,
               "convert": ConvertConfig, "verify": VerifyConfig, "report": ReportConfig}
