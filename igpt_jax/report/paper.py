"""The paper's figures, and in plain sentences where a run stands beside them.

Chen et al. 2020, "Generative Pretraining from Pixels"; losses: the README of OpenAI's release, ImageNet at 32x32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax.metrics import charts
from igpt_jax.report.runs import Run, most_accurate

# Model, what, figure, unit.
FIGURES = (
    ("iGPT-S, 76M", "ImageNet 32x32, test loss", 2.0895, "nats per pixel"),
    ("iGPT-M, 455M", "ImageNet 32x32, test loss", 2.0614, "nats per pixel"),
    ("iGPT-L, 1.4B", "ImageNet 32x32, test loss", 2.0466, "nats per pixel"),
    ("iGPT-L, 1.4B", "CIFAR-10, linear probe of the best layer", 96.3, "%"),
    ("iGPT-L, 1.4B", "CIFAR-10, low data, 4 / 25 / 400 labels per class", "73.2 / 87.6 / 94.3", "%"),
    ("iGPT-L, 1.4B", "CIFAR-10, fine-tuned", 99.0, "%"),
    ("iGPT-L BERT, 1.4B", "CIFAR-10, fine-tuned", 98.6, "%"),
    ("iGPT-S / M / L", "ImageNet 32x32, linear probe", "41.9 / 54.5 / 60.3", "%"),
    ("iGPT-XL, 6.8B", "ImageNet 64x64, linear probe, five layers", 72.0, "%"),
)
SAID = ("sentence", "probe_sentence", "not_fitted")  # by a scaling study
IMAGES = 128_000_000  # that each model of the paper saw: 1M steps of 128, XL 2M of 64


def pretraining(run: Run) -> list[str]:
    """How far a pretraining is from the paper's: images seen, size."""
    steps, parameters = run.metrics.get("steps"), run.metrics.get("parameters")
    if not steps or not parameters:
        return []
    seen = steps * run.values["batch_size"]
    return [f"It saw {seen:,} images, {100 * seen / IMAGES:.2g} % of the paper's {IMAGES:,}, with {parameters:,} "
            f"parameters, {100 * parameters / 76_571_648:.3g} % of iGPT-S's. Its loss compares with the paper's only "
            "on the same data, resolution and palette.", *_trend(run)]


def _trend(run: Run) -> list[str]:
    said = charts.trend(charts.points_of(run.lines, "step", "eval/nats_per_pixel"), run.values["steps"])
    return [f"It is {said}."] if said else []


def probing(run: Run) -> list[str]:
    """What accuracies by layer say beside the paper's Figure 2 and Table 1."""
    by_layer = {int(layer): accuracy for layer, accuracy in (run.metrics.get("accuracy_by_layer") or {}).items()}
    if len(by_layer) < 2:
        return []
    first, last = min(by_layer), max(by_layer)
    best = run.metrics.get("best_layer")
    if best not in by_layer:  # the result is damaged
        best = max(by_layer, key=by_layer.__getitem__)
    rise, fall = 100 * (by_layer[best] - by_layer[first]), 100 * (by_layer[last] - by_layer[best])
    spread = {row["layer"]: row["interval"] for row in run.by_layer}
    shape = ("does not rise; the paper's rises first" if rise <= 0 else
             "rises to the last layer; the paper's falls after the middle" if best == last or fall >= 0 else
             "rises, and its fall lies within the 95 % intervals"
             if {best, last} <= set(spread) and spread[best][0] <= spread[last][1] else
             "rises and then falls, as the paper's does")
    sentences = [f"Accuracy {shape}: {rise:+.1f} points from layer {first} to layer {best}, {fall:+.1f} points from "
                 f"there to layer {last} (paper, iGPT-L on CIFAR-10: -2.4)."]
    for name, label in (("raw_pixel_accuracy", "raw pixels"), ("untrained_accuracy", "the untrained model")):
        other, mine = run.metrics.get(name), run.metrics.get("test_accuracy")
        if other is not None and mine is not None:
            verb = "beats" if mine > other else "does not beat"
            sentences.append(f"The layer chosen on held-out images, {100 * mine:.1f} %, {verb} {label}, "
                             f"{100 * other:.1f} %.")
    return sentences


def finetuning(run: Run, others: Sequence[Run]) -> list[str]:
    """Fine-tuning beside the best probe on its data in the report."""
    mine = run.metrics.get("test_accuracy")
    best = next((probe for probe in most_accurate(others, "probe") if probe.data == run.data), None)
    if mine is None or best is None:
        return []
    difference = 100 * (mine - best.metrics["test_accuracy"])
    return [f"Fine-tuned: {100 * mine:.1f} %, {abs(difference):.1f} points {'above' if difference > 0 else 'below'} "
            f"the best probe, {best.title} (paper, iGPT-L on CIFAR-10: 2.7 above, where both use the same labels)."]


def sentences(run: Run, runs: Sequence[Run]) -> list[str]:
    """All that can be said of a run beside the paper's."""
    say: Mapping[str, Any] = {"pretrain": pretraining, "probe": probing, "finetune": lambda run: finetuning(run, runs),
                              "scaling": lambda run: [run.metrics[name] for name in SAID if name in run.metrics]}
    return say[run.job](run) if run.job in say else []
