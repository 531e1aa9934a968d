"""Which pixels a model did not expect: nats of each pixel given those before it, by picture, by place and by class.

B batch, E examples, N pictures, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.config import UserError
from igpt_jax.data.store import Split
from igpt_jax.data.token_file import TokenFile
from igpt_jax.evaluation import exact_loss
from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model


@dataclasses.dataclass(frozen=True)
class LossMaps:
    """Nats of a split.

    Attributes:
      by_place_T: mean over all examples, float64.
      by_class: {label: (mean nats per pixel, examples)}; empty where the split has no labels.
      shown_NT: of the first examples, float32.
    """
    by_place_T: np.ndarray
    by_class: Mapping[int, tuple[float, int]]
    shown_NT: np.ndarray


def measure(model: Model, params: Any, split: Split | TokenFile, mesh: Mesh, batch_size: int, table: np.ndarray,
            shown: int) -> LossMaps:
    """The surprise of a whole split, one batch in memory at a time; arguments as of `evaluation.over_split`.

    Raises:
      UserError: the model is masked: it does not go from pixel to pixel.
    """
    if not model.causal:
        raise UserError(f"loss_maps={shown}: only an autoregressive model predicts each pixel from those before it. "
                        "Leave loss_maps=0.")

    def pixel_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array) -> jax.Array:
        return objectives.nats_per_token(model.logits(params, tokens_BT), tokens_BT)

    step = exact_loss.jit_over_batches(pixel_step, mesh)
    sum_T, by_example_E, first = np.zeros(model.dims.T), np.empty(split.count), []
    at = 0
    for nats_BT in exact_loss.over_split(step, params, split, mesh, batch_size, table):
        sum_T += nats_BT.sum(axis=0, dtype=np.float64)
        by_example_E[at:at + len(nats_BT)] = nats_BT.mean(axis=1, dtype=np.float64)
        first.append(nats_BT[:max(0, shown - at)])
        at += len(nats_BT)
    by_class = {}
    if not isinstance(split, TokenFile) and split.labelled:
        labels_E = split.labels(np.arange(split.count))
        for label in np.unique(labels_E):
            of_class_E = by_example_E[labels_E == label]
            by_class[int(label)] = float(of_class_E.mean()), len(of_class_E)
    return LossMaps(sum_T / split.count, by_class, np.concatenate(first))
