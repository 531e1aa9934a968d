"""Per-pixel loss maps: nats of each pixel given those before it, by picture, by position and by class.

B batch, E examples, N pictures, T tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.data.codecs import Codec
from igpt_jax.data.store import Split
from igpt_jax.data.token_file import TokenFile
from igpt_jax.evaluation import exact_loss
from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model


@dataclasses.dataclass(frozen=True)
class LossMaps:
    """Per-pixel loss over a split, in nats.

    Attributes:
      by_position_T: mean over all examples, float64.
      by_class: {label: (mean nats per pixel, number of examples)}; empty if the split has no labels.
      shown_NT: maps of the first N examples, float32.
    """
    by_position_T: np.ndarray
    by_class: Mapping[int, tuple[float, int]]
    shown_NT: np.ndarray


def make_pixel_step(model: Model) -> Callable[..., jax.Array]:
    """(params, tokens_BT, ids_B) -> nats of each pixel given those before it, [B, T], of an autoregressive model."""
    def pixel_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array) -> jax.Array:
        return objectives.nats_per_token(model.logits(params, tokens_BT), tokens_BT)

    return pixel_step


def measure(model: Model, params: Any, split: Split | TokenFile, mesh: Mesh, batch_size: int, codec: Codec,
            shown: int) -> LossMaps:
    """Computes the loss maps of a whole split, with one batch in memory at a time.

    Args:
      model: autoregressive.
      params, split, mesh, batch_size, codec: those of `exact_loss.over_split`.
      shown: number of examples whose maps are kept.
    """
    step = exact_loss.jit_over_batches(make_pixel_step(model), model, mesh)
    sum_T, by_example_E, first = np.zeros(model.dims.T), np.empty(split.count), []
    at = 0
    for nats_BT in exact_loss.over_split(step, params, split, mesh, batch_size, codec):
        sum_T += nats_BT.sum(axis=0, dtype=np.float64)
        by_example_E[at:at + len(nats_BT)] = model.dims.C * nats_BT.mean(axis=1, dtype=np.float64)  # per pixel
        first.append(nats_BT[:max(0, shown - at)])
        at += len(nats_BT)
    by_class = {}
    if not isinstance(split, TokenFile) and split.labeled:
        labels_E = split.labels(np.arange(split.count))
        for label in np.unique(labels_E):
            of_class_E = by_example_E[labels_E == label]
            by_class[int(label)] = float(of_class_E.mean()), len(of_class_E)
    return LossMaps(sum_T / split.count, by_class, np.concatenate(first))
