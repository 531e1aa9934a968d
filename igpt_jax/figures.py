"""Curves of finished jobs, as PNG. The object interface of matplotlib keeps no global state and needs no display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure

from igpt_jax import storage


def accuracy_curve(path: storage.epath.Path, by_layer: Sequence[Mapping[str, Any]], others: Mapping[str, float],
                   test_count: int) -> None:
    """Draws test accuracy over layers with its 95 % intervals (the paper's Figure 2), and baselines as dashed lines.

    Args:
      path: of the PNG.
      by_layer: rows with `layer`, `test_accuracy` and `interval`.
      others: accuracy by name.
      test_count: examples counted.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    layers = [row["layer"] for row in by_layer]
    accuracies = [100 * row["test_accuracy"] for row in by_layer]
    spreads = [[100 * abs(row["interval"][side] - row["test_accuracy"]) for row in by_layer] for side in (0, 1)]
    axes.errorbar(layers, accuracies, yerr=spreads, marker="o", markersize=4, capsize=2.5, linewidth=1.4,
                  color="tab:blue", label="layers, with 95 % intervals")
    for (name, accuracy), style in zip(others.items(), ("--", ":"), strict=False):
        axes.axhline(100 * accuracy, color="0.45", linestyle=style, linewidth=1.2,
                     label=f"{name}: {100 * accuracy:.1f} %")
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel(f"accuracy on {test_count:,} test images, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.92", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.publish(path, png.getvalue())
