"""Charts as SVG that takes the colors of the page around it, light or dark."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from igpt_jax.metrics import figures

SIZE = (4.8, 2.8)  # inches; small, so that its letters can be read on a phone
# Drawn in these, they become the page's own colors.
TEXT, GRID = "#010203", "#040506"
COLOURS = ("#3b82f6", "#f59e0b", "#ef4444", "#10b981", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "igpt", "font.size": 9, "text.color": TEXT, "axes.edgecolor": TEXT,
         "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
         "legend.frameon": False}


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
      spread: (low, high) of each y, drawn as error bars; none where empty.
      dots: mark each point.
    """
    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[tuple[float, float]] = ()
    dots: bool = False


@figures.drawn(**STYLE)
def lines(series: Sequence[Series], x_label: str, y_label: str, levels: Mapping[str, float] | None = None) -> str:
    """Lines over a common axis, with dashed horizontal lines at `levels`."""
    import matplotlib.ticker

    figure = _new(SIZE)
    axes = figure.subplots()
    for index, (label, x, y, spread, dots) in enumerate(series):
        errors = [[abs(bounds[side] - value) for bounds, value in zip(spread, y, strict=True)]
                  for side in (0, 1)] if spread else None
        axes.errorbar(x, y, yerr=errors, color=COLOURS[index % len(COLOURS)], linewidth=1.4,
                      marker="o" if dots else None, markersize=3.5, capsize=2, label=figures.label(label))
    for index, (label, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color=TEXT, alpha=0.6, linewidth=1.1, linestyle=("--", ":", "-.")[index % 3],
                     label=figures.label(label))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
    if len(series) + len(levels or {}) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


@figures.drawn(**STYLE)
def split_bar(parts: Mapping[str, float], x_label: str) -> str:
    """One bar, split: how a whole is made up."""
    figure = _new((SIZE[0], 1.4))
    axes = figure.subplots()
    left = 0.0
    for index, (name, size) in enumerate(parts.items()):
        axes.barh(0, size, left=left, color=COLOURS[index % len(COLOURS)], label=figures.label(name))
        left += size
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(x_label)
    figure.legend(loc="outside lower center", ncols=4)
    return _svg(figure)


def _new(size: tuple[float, float]) -> Any:
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=size, layout="constrained")


def _svg(figure: Any) -> str:
    """The figure as an element without a size of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    head, rest = text[text.index("<svg"):].split(">", 1)
    box = head[head.index("viewBox="):].split('"')[1]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{rest}'
    return svg.replace(TEXT, "currentColor").replace(GRID, "var(--grid, #ddd)")
