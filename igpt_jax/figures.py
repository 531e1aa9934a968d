"""Curves of finished jobs, as PNG. The object interface of matplotlib keeps no global state and needs no display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from igpt_jax import storage
from igpt_jax.topology import GIB


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
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # nothing is drawn over
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.publish(path, png.getvalue())


def scaling_curve(path: storage.epath.Path, title: str, curve: Sequence[tuple[int, float, float]],
                   compiled: tuple[int, float, float], usable_bytes: int) -> None:
    """Draws seconds a step and GiB a device over device counts as a PNG.

    Args:
      path: of the PNG.
      title: of the figure.
      curve: (devices, seconds, bytes) by estimate, the best mesh at each count.
      compiled: the same of what was compiled.
      usable_bytes: of a device's memory, drawn as a line.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    counts = [point[0] for point in curve]
    panels = (("seconds per step", 1, 1.0), ("GiB per device", 2, GIB))
    for axes, (label, index, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(counts, [point[index] / unit for point in curve], color="tab:blue", marker=".", linewidth=1.2,
                  label="by formula, best mesh")
        axes.plot([compiled[0]], [compiled[index] / unit], "o", color="tab:orange", markersize=7, label="compiled")
        if index == 2:
            axes.axhline(usable_bytes / unit, color="0.5", linestyle="--", linewidth=1, label="a device's memory")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts[::2], [f"{count:,}" for count in counts[::2]])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xlabel("devices")
        axes.set_ylabel(label)
        axes.grid(color="0.92", linewidth=0.8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.publish(path, png.getvalue())
