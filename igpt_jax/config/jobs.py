"""The table of jobs, and the keys of demo, plan, convert, verify and report."""

import dataclasses
import types
from collections.abc import Mapping
from typing import ClassVar

from igpt_jax.config.data import PrepareConfig, SplitConfig
from igpt_jax.config.evaluation import EvaluateConfig, ProbeConfig, SampleConfig
from igpt_jax.config.keys import PRECISIONS, Keys, at_least, each, key, one_of, positive, require, section, within
from igpt_jax.config.model import LEVELS
from igpt_jax.config.scaling import ScalingConfig
from igpt_jax.config.training import PARAMETERS, FinetuneConfig, PretrainConfig

JOBS: Mapping[str, str] = types.MappingProxyType({
    "prepare": "converts images to a pixel store, and fits or imports a palette",
    "pretrain": "trains a model: autoregressive, masked (BERT), denoising or diffusion; resumes where it stopped",
    "finetune": "trains a checkpoint or a new model to classify, on labeled images",
    "evaluate": "computes exact nats per pixel of checkpoints over a whole split; can follow a run",
    "probe": "fits a linear classifier on the features of every layer: accuracy by depth",
    "sample": "draws unconditional samples, and completes given images",
    "demo": "serves a page to play with a model: completions row by row, loss maps, samples, classes",
    "scaling": "trains sizes at equal FLOPs and fits a scaling law: which size for which budget",
    "plan": "compiles a training step for a TPU or GPU topology: memory, time per step, fastest mesh",
    "convert": "converts weights from and to OpenAI's and Hugging Face's formats, with a certificate",
    "verify": "checks checkpoints or a pixel store against their checksums",
    "report": "writes one self-contained HTML page about any set of workdirs",
})


@dataclasses.dataclass(frozen=True)
class VerifyConfig(Keys):
    job: str = key("verify", "the job that this configuration is for", resume="free")
    path: str = key("", "a pixel store, a workdir of pretrain or finetune, or one step of it (DIR/checkpoints/STEP)",
                    resume="free")


@dataclasses.dataclass(frozen=True)
class ReportConfig(Keys):
    job: str = key("report", "the job that this configuration is for", resume="free")
    workdirs: str = key("", "workdirs of jobs: comma list or globs ('runs/*')", resume="free")


@dataclasses.dataclass(frozen=True)
class DemoConfig(Keys):
    job: str = key("demo", "the job that this configuration is for", resume="free")
    checkpoint: str = key("", "a workdir of pretrain or finetune, one step of it (DIR/checkpoints/STEP), "
                              "huggingface:DIR or openai:PREFIX", resume="free")
    parameters: str = key("raw", "parameters of the checkpoint: raw, or ema (their moving average)", resume="free",
                          rule=one_of(*PARAMETERS))
    palette: str = key("", "palette's .npy for weights without one, such as OpenAI's; empty: the weights' own",
                       resume="free")
    probe: str = key("", "workdir of the probe job that classifies; empty: one beside the checkpoint's workdir that "
                         "probed this step, if any", resume="free")
    data: SplitConfig = section(SplitConfig)
    host: str = key("127.0.0.1", "address to listen on; 127.0.0.1: for this machine only; 0.0.0.0: for other machines "
                                 "too, without a password", resume="free")
    port: int = key(8000, "port to listen on; 0: any free one", resume="free", rule=within(0, 65535))
    precision: str = key("float32", "dtype of activations and matrix products: bfloat16 or float32", resume="free",
                         rule=one_of(*PRECISIONS))


@dataclasses.dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """Pretrain's keys, which define the step, and keys of the target. Keys of reading and saving have no effect."""
    job: str = key("plan", "the job that this configuration is for", resume="free")
    image_size: int = key(32, "height and width, pixels", resume="free", rule=at_least(1))
    topology: str = key("attached", "v4:4x4x4, v5e:16x16, v5e:16x16*4 (slices), v5p:4x4x8, v6e:16x16, a100:8, h100:8, "
                                    "h100:8x4 (nodes), h200:8, cpu:8; attached: this machine's devices", resume="free")
    step: str = key("train", "step to compile: train, evaluate or sample (unconditional, batch_size images at once)",
                    resume="free", rule=one_of("train", "evaluate", "sample"))
    precision: str = key("bfloat16", "dtype of activations and matrix products: bfloat16 or float32; float64: "
                                     "everything", resume="same", rule=one_of(*PRECISIONS))
    palette_size: int = key(512, "codec=palette: number of colors", resume="free", rule=at_least(1))
    search: bool = key(False, "search for the fastest mesh, accumulate, model.remat and model.attention that fit",
                       resume="free", compiled=False)
    search_compiles: int = key(4, "number of candidates that the search compiles, best estimates first", resume="free",
                               rule=at_least(1), compiled=False)
    python: str = key("", "Python interpreter with jax[cuda13], for GPU topologies; empty: this one",
                      resume="free", compiled=False)
    roofline_share: float = key(0.0, "assumed fraction of the roofline's speed; 0: fitted to public runs "
                                     "(docs/scaling.md)", resume="free", rule=within(0, 1), compiled=False)
    calibration: str = key("", "finished pretrain workdirs on the same kind of device, whose speed replaces that of "
                               "public runs: comma list or glob; empty: none", resume="free", compiled=False)
    dollars_per_device_hour: float = key(-1.0, "price of one device, dollars per hour; -1: the list price in "
                                               "parallel/topology.py", resume="free", compiled=False,
                                         rule=lambda name, value: require(
                                             value == -1 or value >= 0, f"{name}={value} must be -1 or not negative."))
    save_gigabytes_per_second: float = key(5.0, "write bandwidth of storage over all hosts, GB/s", resume="free",
                                           rule=positive, compiled=False)
    failures_per_1000_device_days: float = key(0.5, "interruptions per 1000 device days (Llama 3 on 16,384 GPUs: 0.47)",
                                               resume="free", rule=positive, compiled=False)

    @property
    def vocabulary(self) -> int:
        """V, the number of different tokens."""
        return self.palette_size if self.codec == "palette" else LEVELS


@dataclasses.dataclass(frozen=True)
class ExportConfig(Keys):
    group: ClassVar[str] = "export."

    rows: int = key(0, "given rows of each image in the exported sampler", resume="free", rule=at_least(0))
    temperature: float = key(1.0, "as the sample job's", resume="free", rule=at_least(0))
    top_k: int = key(0, "as the sample job's", resume="free", rule=at_least(0))
    top_p: float = key(1.0, "as the sample job's", resume="free", rule=within(0, 1, "(]"))
    probe: str = key("", "workdir of the probe job whose best classifier is exported too; empty: none",
                     resume="free")
    platforms: tuple[str, ...] = key(("cpu", "cuda", "tpu"), "platforms that the programs run on", resume="free",
                                     rule=each(one_of("cpu", "cuda", "rocm", "tpu")))

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.platforms), "export.platforms is empty. Name at least one: ('cpu',)")


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Keys):
    job: str = key("convert", "the job that this configuration is for", resume="free")
    convert_from: str = key("", "openai:PREFIX (DIR/model.ckpt-1000000) | huggingface:DIR | orbax:DIR (a workdir of "
                                "pretrain, or one step of it)", resume="free")
    convert_to: str = key("", "the same kinds, or export:DIR (programs that need only jax); empty: orbax:WORKDIR, a "
                              "checkpoint for other jobs", resume="free")
    parameters: str = key("raw", "convert_from=orbax: the checkpoint's parameters: raw, or ema (their moving average)",
                          resume="free", rule=one_of(*PARAMETERS))
    palette: str = key("", "palette's .npy for weights without one, such as OpenAI's; empty: the weights' own",
                       resume="free")
    head: str = key("pixels", "model of transformers to write: pixels (ImageGPTForCausalImageModeling) or classes "
                              "(ImageGPTForImageClassification)",
                    resume="free", rule=one_of("pixels", "classes"))
    certificate: str = key("full", "full: hashes of all tensors, and logits of both sides, with both models in "
                                   "memory; hashes: without logits", resume="free", rule=one_of("full", "hashes"))
    export: ExportConfig = section(ExportConfig)

    def __post_init__(self):
        super().__post_init__()
        target = self.convert_to.partition(":")[0]
        if target != "huggingface":
            self.refuse_given("head", why="unless convert_to=huggingface:DIR. Leave it out.")
        if target == "export":
            self.refuse_given("certificate", why="on convert_to=export:DIR. Leave it out.")
        else:
            self.export.refuse_given(why="unless convert_to=export:DIR. Leave it out.")


JOB_CONFIGS = {"prepare": PrepareConfig, "pretrain": PretrainConfig, "finetune": FinetuneConfig,
               "evaluate": EvaluateConfig, "probe": ProbeConfig, "sample": SampleConfig, "demo": DemoConfig,
               "scaling": ScalingConfig, "plan": PlanConfig, "convert": ConvertConfig, "verify": VerifyConfig,
               "report": ReportConfig}
