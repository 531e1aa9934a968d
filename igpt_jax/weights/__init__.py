"""Reads and writes weights: OpenAI's TF1 checkpoints, Hugging Face folders and our checkpoints, under our names."""

from collections.abc import Iterable

import numpy as np

from igpt_jax.config import UserError, nearest
from igpt_jax.data import palette
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


def open_weights(kind: str, path: str, parameters: str = "raw") -> Weights:
    """The weights in `path`: of our checkpoints the raw parameters or, with `ema`, their moving average.

    Raises:
      UserError: they are missing, damaged or not those of an ImageGPT; or there is no moving average.
    """
    if parameters == "raw":
        return KINDS[kind](path)
    if kind != "orbax":
        raise UserError(f"parameters={parameters}: {kind}:{path} holds no moving average. Leave out parameters.")
    return OurWeights(path, parameters)


def palette_for(weights: Weights, given: str, file: str, option: str) -> np.ndarray:
    """The palette of weights, float32 [V, 3].

    Args:
      weights: to find the palette of.
      given: what the user typed for them.
      file: a palette's .npy; empty: the weights' own.
      option: how the user names such a file.

    Raises:
      UserError: the weights have none and no file is given, or its length is not the weights'.
    """
    palette_VC = palette.load(file) if file else weights.palette_VC
    if palette_VC is None:
        raise UserError(f"{given} comes without its palette. Set {option} to its .npy file "
                        "(OpenAI's is kmeans_centers.npy).")
    if len(palette_VC) != weights.sizes["V"]:
        raise UserError(f"palette {file} has {len(palette_VC)} colors, the weights in {given} have "
                        f"{weights.sizes['V']}. Give the palette that they were trained with.")
    return palette_VC


def refuse_non_square(weights: Weights, given: str) -> None:
    """Raises UserError unless the weights are a model of square images."""
    if round(weights.sizes["T"] ** 0.5) ** 2 != weights.sizes["T"]:
        raise UserError(f"{given} has {weights.sizes['T']} positions, which is not a square number. Give a model of "
                        "square images.")
