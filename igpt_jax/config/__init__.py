"""Configuration keys of all jobs: default, unit, rules. No JAX is imported here.

A job's configuration is one frozen dataclass. `base_config(job)` returns its defaults as a locked `ConfigDict`, for
config files and the command line; `parse` turns that back into the dataclass. Both refuse unknown keys and name the
nearest known one. `python -m igpt_jax JOB --help` prints a job's keys.
"""

from igpt_jax.config.data import DataConfig, PrepareConfig
from igpt_jax.config.evaluation import CompletionKeys, EvaluateConfig, ProbeConfig, ProbingConfig, SampleConfig
from igpt_jax.config.jobs import (
    JOB_CONFIGS,
    JOBS,
    ConvertConfig,
    DemoConfig,
    ExportConfig,
    PlanConfig,
    ReportConfig,
    VerifyConfig,
)
from igpt_jax.config.keys import PRECISIONS, UserError, nearest, precision_on
from igpt_jax.config.model import ATTENTION_BACKENDS, CODECS, LEVELS, MODELS, FinetuneModelConfig, ModelConfig
from igpt_jax.config.parsing import (
    aliases,
    base_config,
    flat,
    key_attributes,
    keys,
    override,
    parse,
    plain,
    to_dict,
    values_with,
    wrong_type,
)
from igpt_jax.config.scaling import ScalingConfig
from igpt_jax.config.training import FinetuneConfig, MeshConfig, OptimizerConfig, PretrainConfig, SampleMeshConfig

__all__ = [
    "ATTENTION_BACKENDS", "CODECS", "CompletionKeys", "ConvertConfig", "DataConfig", "DemoConfig", "EvaluateConfig",
    "ExportConfig", "FinetuneConfig", "FinetuneModelConfig", "JOBS", "JOB_CONFIGS", "LEVELS", "MODELS", "MeshConfig",
    "ModelConfig", "OptimizerConfig", "PRECISIONS", "PlanConfig", "PrepareConfig", "PretrainConfig", "ProbeConfig",
    "ProbingConfig", "ReportConfig", "SampleConfig", "SampleMeshConfig", "ScalingConfig", "UserError", "VerifyConfig",
    "aliases", "base_config", "flat", "key_attributes", "keys", "nearest", "override", "parse", "plain", "precision_on",
    "to_dict", "values_with", "wrong_type",
]
