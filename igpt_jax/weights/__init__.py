"""Reads and writes weights: OpenAI's TF1 checkpoints, Hugging Face folders and our checkpoints, under our names."""

from collections.abc import Iterable

from igpt_jax.config import UserError, nearest
from igpt_jax.weights.huggingface import HuggingFaceWeights
from igpt_jax.weights.names import Weights
from igpt_jax.weights.openai import OpenAIWeights
from igpt_jax.weights.ours import OurWeights

KINDS = {"openai": OpenAIWeights, "huggingface": HuggingFaceWeights, "orbax": OurWeights}


def kind_and_path(key: str, value: str, kinds: Iterable[str] = KINDS) -> tuple[str, str]:
    """Splits the value of a config key: `openai:PATH` gives ('openai', PATH). Raises UserError."""
    kind, colon, path = value.partition(":")
    if not (colon and path):
        raise UserError(f"{key}={value!r} must read {' or '.join(f'{kind}:PATH' for kind in kinds)}.")
    if kind not in kinds:
        raise UserError(f"{key}={value!r} is not known. {nearest(kind, list(kinds))}")
    return kind, path


def open_weights(kind: str, path: str) -> Weights:
    """The weights in `path`. Raises UserError if they are missing, damaged or not those of an ImageGPT."""
    return KINDS[kind](path)
