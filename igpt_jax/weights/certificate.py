"""Certifies a conversion: compares both sides' tensors bit by bit, and the logits that each side's framework computes.

Equal bits under the name table do not prove the table. The logits do: OpenAI's side is computed from the variables'
own names, Hugging Face's by transformers, ours by the model that trains and samples.

B batch, T tokens, V palette, K classes.
"""

import hashlib
from typing import Any

import numpy as np

from igpt_jax.weights.names import Weights, masked

IMAGES, SEED, HIDDEN = 2, 0, 0.15  # of a masked model's pixels: the share that OpenAI trained with
LOGIT_LIMIT = 1e-4  # largest difference in float32, relative to the largest logit where that exceeds 1


def fixed_images(weights: Weights) -> tuple[np.ndarray, np.ndarray | None]:
    """The same images for every conversion of a size: all colors equally often, int64 [B, T], in random order.

    And the pixels [B, T] to hide from a masked model, at least one of each image; None for others.
    """
    rng, shape = np.random.default_rng(SEED), (IMAGES, weights.sizes["T"])
    tokens_BT = rng.permutation(np.arange(np.prod(shape)) % weights.sizes["V"]).reshape(shape)
    hidden_BT = rng.random(shape) < HIDDEN
    hidden_BT[:, 0] = True
    return tokens_BT, hidden_BT if masked(weights) else None


@np.errstate(over="ignore", invalid="ignore")  # overflow is reported with the result
def nats_per_pixel(logits_BTV: np.ndarray, tokens_BT: np.ndarray, hidden_BT: np.ndarray | None = None) -> float:
    """Mean negative log likelihood, added up in float64: of all pixels, or over an image's hidden ones, then images."""
    wide_BTV = logits_BTV.astype(np.float64)
    largest_BT1 = wide_BTV.max(-1, keepdims=True)
    log_sum_BT1 = largest_BT1 + np.log(np.exp(wide_BTV - largest_BT1).sum(-1, keepdims=True))
    nats_BT = (log_sum_BT1 - np.take_along_axis(wide_BTV, tokens_BT[..., None], -1))[..., 0]
    return float(nats_BT.mean(1, where=True if hidden_BT is None else hidden_BT).mean())


def certify(source: Weights, target: Weights, compare_logits: bool) -> dict[str, Any]:
    """Reads both sides from their files and compares them.

    Args:
      source, target: the same model in two kinds of files.
      compare_logits: also compute: both models whole in memory, one after the other.

    Returns:
      verdict: `same` or `differs`; parameters: their number; differing: parameters whose bits differ, with the layer;
      not_carried: parameters of the source that the target cannot hold; tensors: SHA-256 of each side's tensors
      (float32, C order); logits, of pixels, and class_logits: see `_compare_logits`.
    """
    shared = [name for name in source.names if name in target.names]
    count, differing = 0, []
    for name in shared:
        size, faults = _compare(name, source, target)
        count += size
        differing += faults
    logits = _compare_logits(source, target) if compare_logits and not differing else {}
    same = not differing and all(head["max_difference"] <= head["limit"]
                                 for head in logits.values() if head["compared"])
    return {"verdict": "same" if same else "differs", "parameters": count, "differing": differing,
            "not_carried": [name for name in source.names if name not in target.names], **logits,
            "tensors": {side: {name: _sha256(weights.tensor(name)) for name in weights.tensor_names()}
                        for side, weights in (("source", source), ("target", target))}}


def _compare(name: str, source: Weights, target: Weights) -> tuple[int, list[str]]:
    """The size of a parameter, and the layers whose bits differ. One parameter is in memory at a time."""
    ours, theirs = source.layers(name), target.layers(name)
    if len(ours) != len(theirs):
        return 0, [f"{name} ({len(ours)} layers, {len(theirs)} in the target)"]
    different = [layer for layer in range(len(ours)) if _sha256(ours[layer]) != _sha256(theirs[layer])]
    size = len(ours) * ours[0].size
    return size, [f"{name}[{layer}]" if len(ours) > 1 else name for layer in different]


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").data).hexdigest()


@np.errstate(over="ignore", invalid="ignore")
def _compare_logits(source: Weights, target: Weights) -> dict[str, dict[str, Any]]:
    """`logits` and `class_logits` on `fixed_images`: the largest difference and its limit; of pixels also both sides'
    nats per pixel. Or why they are not compared.
    """
    tokens_BT, hidden_BT = fixed_images(source)
    sides = {"source": source, "target": target}
    outputs = {side: weights.outputs(tokens_BT, hidden_BT) for side, weights in sides.items()}

    def compare(head: str) -> dict[str, Any]:
        missing = [side for side in sides if head not in outputs[side]]
        if missing:
            return {"compared": False, "reason": f"the {' and the '.join(missing)} cannot compute them here: "
                    f"transformers is not installed, TensorFlow was imported before triton, or the model has no head "
                    f"for {head}"}
        logits = {side: outputs[side][head] for side in sides}
        largest = max(1.0, *(float(np.abs(each).max()) for each in logits.values()))
        found = {"compared": True, "images": IMAGES, "seed": SEED, "limit": LOGIT_LIMIT * largest,
                 "max_difference": float(np.abs(logits["source"] - logits["target"]).max()),
                 "computed_by": {side: weights.framework for side, weights in sides.items()}}
        if head == "pixels":
            found["nats_per_pixel"] = {side: nats_per_pixel(logits_BTV, tokens_BT, hidden_BT)
                                       for side, logits_BTV in logits.items()}
        return found

    return {"logits": compare("pixels"), "class_logits": compare("classes")}
