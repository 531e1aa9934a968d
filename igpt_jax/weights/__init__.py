"""Weights in and out: OpenAI's TF1 checkpoints, Hugging Face folders and our own, each seen as our parameters."""

from collections.abc import Iterable

from igpt_jax.config import UserError, nearest
from igpt_jax.weights.huggingface import HuggingFaceWeights
from igpt_jax.weights.names import Weights
from igpt_jax.weights.openai import OpenAIWeights
from igpt_jax.weights.ours import OurWeights

KINDS = {"openai": OpenAIWeights, "huggingface": HuggingFaceWeights, "orbax": OurWeights}


def kind_and_path(key: str, typed: str, kinds: Iterable[str] = KINDS) -> tuple[str, str]:
    """('openai', PATH) of `openai:PATH`, the value of a config key. Raises UserError."""
    kind, colon, path = typed.partition(":")
    if not (colon and path):
        raise UserError(f"{key}={typed!r} must read {' or '.join(f'{kind}:PATH' for kind in kinds)}.")
    if kind not in kinds:
        raise UserError(f"{key}={typed!r} is not known. {nearest(kind, list(kinds))}")
    return kind, path


def open_weights(kind: str, path: str) -> Weights:
    """The weights in `path`. Raises UserError where they are missing, damaged or not an ImageGPT's."""
    return KINDS[kind](path)
