"""Figures of runs and of finished jobs, as PNG.

Every function that uses Matplotlib, here and for reports, is decorated with `drawn`: it runs with Matplotlib's
defaults, whatever the user has set. A figure that cannot be drawn costs one line on stderr, never the job.

N images, Y rows, X columns, C channels, V palette.
"""

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from igpt_jax import storage
from igpt_jax.metrics.logging import say
from igpt_jax.parallel.topology import GIB

Points = Sequence[tuple[float, float | None]]
CURVES = 10  # most curves in one figure: Matplotlib's default cycle has 10 colors
LONGEST_LABEL = 40  # characters that fit one of a legend's two columns


# Matplotlib. Its object interface needs neither pyplot nor a display. It is imported on first use: that takes a while,
# and most runs draw nothing until they end.

def drawn(**settings: Any) -> Callable[[Callable], Callable]:
    """Decorates a function that draws: it runs with Matplotlib's defaults and `settings`.

    If the function raises, a line on stderr says so, and the decorated function returns None.
    """
    def decorate(draw: Callable) -> Callable:
        @functools.wraps(draw)
        def harmless(*arguments: Any, **named: Any) -> Any:
            try:
                with _defaults(settings):
                    return draw(*arguments, **named)
            except Exception as error:  # of any kind: no figure is worth a run
                what = draw.__name__.replace("_", " ")
                why = " ".join(str(error).split())
                say(f"The figure {what!r} cannot be drawn: {why}. The job continues without it.")
        return harmless
    return decorate


@contextlib.contextmanager
def _defaults(settings: Mapping[str, Any]) -> Iterator[None]:
    # Matplotlib warns about faults in the user's matplotlibrc and about rebuilding its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # A notebook sets MPLBACKEND for its child processes. Importing Matplotlib fails if that backend is not installed.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with warnings.catch_warnings(action="ignore"), matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, **settings})  # names may contain $
        yield


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """`text` as Matplotlib can show it: characters without a glyph become escapes; long text is cut in the middle."""
    glyphs = _glyphs()
    text = "".join(char if ord(char) in glyphs else char.encode("unicode_escape").decode() for char in text)
    if len(text) > longest:
        text = f"{text[:longest // 2 - 1]}…{text[-longest // 2:]}"
    return f"\u200b{text}" if text.startswith("_") else text  # legends omit labels that begin with _


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters of Matplotlib's default font."""
    import matplotlib.font_manager

    return frozenset(matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans")).get_charmap())


def _new(width: float = 7, height: float = 4.2) -> Any:
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.92", linewidth=0.8, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(path: storage.Path, figure: Any) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.publish(path, png.getvalue())


# Curves.

@drawn()
def loss_curve(path: storage.Path, metrics: Sequence[Mapping[str, float | None]], palette_size: int) -> None:
    """Draws training and held-out loss over steps, and the loss of uniform guessing, ln V, as a dashed line.

    Args:
      path: of the PNG.
      metrics: from `load_metrics`; reads `train/nats_per_pixel` and `eval/nats_per_pixel`.
      palette_size: V, colors.
    """
    figure = _new()
    axes = figure.subplots()
    axes.axhline(math.log(palette_size), color="0.6", linestyle="--", linewidth=1,
                 label=f"guessing: ln {palette_size} = {math.log(palette_size):.3f}")
    curves = (("train/nats_per_pixel", "train", {"color": "tab:blue", "linewidth": 1.2}),
              ("eval/nats_per_pixel", "held-out", {"color": "tab:orange", "linewidth": 1.6, "marker": "o",
                                                   "markersize": 3.5}))
    for name, title, style in curves:
        points = [(line["step"], line[name]) for line in metrics if _finite(line.get(name))]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{title}: {points[-1][1]:.3f} at the end", **style)
    _plain(axes, "step", "nats per pixel")
    axes.legend(frameon=False)
    _save(path, figure)


@drawn()
def loss_over_steps(path: storage.Path, runs: Mapping[str, Points]) -> None:
    """Draws checkpoints' nats per pixel over their steps, one line per run.

    Args:
      path: of the PNG.
      runs: (step, nats per pixel) by name of the run.
    """
    figure = _new()
    axes = figure.subplots()
    for name, points in _some(axes, runs, "runs"):
        if points := [point for point in points if _finite(point[1])]:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.4,
                      label=label(f"{name}: {points[-1][1]:.3f} at the end"))
    _plain(axes, "step", "nats per pixel")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(path, figure)


@drawn()
def accuracy_over_loss(path: storage.Path, runs: Mapping[str, Sequence[Mapping[str, Any]]],
                       test_count: int) -> None:
    """Draws the best layer's probe accuracy over the loss, which falls to the right (the paper's Figure 3).

    Args:
      path: of the PNG.
      runs: rows with `nats_per_pixel`, `steps`, `probe_accuracy` and its interval, by name of the run.
      test_count: test images that each accuracy is measured on.
    """
    figure = _new()
    axes = figure.subplots()
    for name, rows in _some(axes, runs, "runs"):
        rows = [row for row in rows if _finite(row["nats_per_pixel"]) and _finite(row["probe_accuracy"])]
        losses, accuracies = ([row[column] for row in rows] for column in ("nats_per_pixel", "probe_accuracy"))
        spreads = _spreads(rows, "probe_accuracy", "probe_interval")
        axes.errorbar(losses, [100 * each for each in accuracies], yerr=spreads, marker="o", markersize=4, capsize=2.5,
                      linewidth=1.4, label=label(name))
        for row, loss, accuracy in zip(rows, losses, accuracies, strict=True):
            axes.annotate(f"{row['steps']:,}", (loss, 100 * accuracy), textcoords="offset points", xytext=(5, -11),
                          fontsize=8, color="0.35")
    axes.invert_xaxis()
    _plain(axes, "nats per pixel, falling; numbers are steps", f"accuracy on {test_count:,} test images, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(path, figure)


@drawn()
def accuracy_by_layer(path: storage.Path, curves: Mapping[str, Sequence[Mapping[str, Any]]],
                      others: Mapping[str, float], test_count: int) -> None:
    """Draws test accuracy over layers with its 95 % intervals (the paper's Figure 2), and baselines as dashed lines.

    Args:
      path: of the PNG.
      curves: rows with `layer`, `test_accuracy` and its interval, by name of the checkpoint.
      others: accuracy of each baseline, by name; at most two.
      test_count: test images that each accuracy is measured on.
    """
    figure = _new()
    axes = figure.subplots()
    for name, rows in _some(axes, curves, "checkpoints"):
        spreads = _spreads(rows, "test_accuracy", "interval")
        axes.errorbar([row["layer"] for row in rows], [100 * row["test_accuracy"] for row in rows], yerr=spreads,
                      marker="o", markersize=4, capsize=2.5, linewidth=1.4,
                      label=label(name) or "layers, with 95 % intervals")
    for (name, accuracy), style in zip(others.items(), ("--", ":"), strict=False):
        axes.axhline(100 * accuracy, color="0.45", linestyle=style, linewidth=1.2,
                     label=label(f"{name}: {100 * accuracy:.1f} %"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes, "layer (0: the embedding)", f"accuracy on {test_count:,} test images, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # outside, where it hides no curve
    _save(path, figure)


def _some(axes: Any, curves: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
    """All curves; if there are more than CURVES, an evenly spaced selection, and a title that says so."""
    shown = np.unique(np.linspace(0, len(curves) - 1, CURVES).round().astype(int))
    if len(shown) < len(curves):
        axes.set_title(f"{len(shown)} of {len(curves)} {what}", fontsize=10)
    return [list(curves.items())[index] for index in shown]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _spreads(rows: Sequence[Mapping[str, Any]], accuracy: str, interval: str) -> list[list[float]]:
    """Distances of the intervals' lower and upper ends from the accuracies, in percentage points."""
    return [[100 * abs(row[interval][end] - row[accuracy]) for row in rows] for end in (0, 1)]


@drawn()
def scaling_curve(path: storage.Path, title: str, curve: Sequence[tuple[int, float, float]],
                  compiled: tuple[int, float, float], usable_bytes: int) -> None:
    """Draws seconds per step and GiB per device over the number of devices.

    Args:
      path: of the PNG.
      title: of the figure.
      curve: (devices, seconds per step, bytes per device), estimated for the best mesh at each number of devices.
      compiled: the same for the step that was compiled.
      usable_bytes: memory of a device, drawn as a dashed line.
    """
    import matplotlib.ticker

    figure = _new(9, 3.8)
    figure.suptitle(label(title, 100), fontsize=11)
    counts = [point[0] for point in curve]
    panels = (("seconds per step", 1, 1.0), ("GiB per device", 2, GIB))
    for axes, (title, index, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(counts, [point[index] / unit for point in curve], color="tab:blue", marker=".", linewidth=1.2,
                  label="by formula, best mesh")
        axes.plot([compiled[0]], [compiled[index] / unit], "o", color="tab:orange", markersize=7, label="compiled")
        if index == 2:
            axes.axhline(usable_bytes / unit, color="0.5", linestyle="--", linewidth=1, label="a device's memory")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(matplotlib.ticker.LogFormatter())  # the default writes 10^n as a formula
        axes.set_xticks(counts[::2], [f"{count:,}" for count in counts[::2]])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        _plain(axes, "devices", title)
        axes.legend(frameon=False, fontsize=8)
    _save(path, figure)


# Images.

def image_grid(images_NYXC: np.ndarray, columns: int, scale: int = 4, gap: int = 2) -> Image.Image:
    """Arranges images in rows, with white gaps between them.

    Args:
      images_NYXC: uint8, RGB.
      columns: images per row.
      scale: side of the sharp square that each pixel becomes, in pixels.
      gap: width of the gaps, in pixels.
    """
    big = images_NYXC.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = big.shape
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(big):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top:top + height, left:left + width] = image
    return Image.fromarray(grid)


def save_png(path: storage.Path, image: Image.Image) -> None:
    """Writes a Pillow image as a PNG file, to a local path or a bucket."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    storage.publish(path, png.getvalue())


@drawn()
def loss_maps(path: storage.Path, images_NYXC: np.ndarray, nats_NYX: np.ndarray) -> None:
    """Draws each image with its per-pixel loss as a heat map to its right.

    Args:
      path: of the PNG.
      images_NYXC: uint8, RGB.
      nats_NYX: nats of each pixel, given the pixels before it.
    """
    from matplotlib import cm, colormaps, colors

    scale = colors.Normalize(0, np.nanquantile(nats_NYX, 0.995))  # so that one outlier does not darken the rest
    heat_NYXC = np.uint8(255 * colormaps["magma"](scale(nats_NYX).clip(0, 1))[..., :3])
    pairs = np.stack([images_NYXC, heat_NYXC], axis=1).reshape(-1, *images_NYXC.shape[1:])
    grid = np.asarray(image_grid(pairs, 2 * min(4, len(images_NYXC)), scale=max(1, 96 // images_NYXC.shape[2]), gap=6))
    figure = _new(1 + grid.shape[1] / 100, 0.4 + grid.shape[0] / 100)
    axes = figure.subplots()
    axes.imshow(grid, interpolation="none")
    axes.axis("off")
    figure.colorbar(cm.ScalarMappable(scale, "magma"), ax=axes, label="nats", fraction=0.04, pad=0.01)
    _save(path, figure)


@drawn()
def loss_by_position(path: storage.Path, nats_YX: np.ndarray, by_class: Mapping[str, float]) -> None:
    """Draws mean nats by position in the image and, if there are classes, by class in a second panel.

    Args:
      path: of the PNG.
      nats_YX: mean over a split.
      by_class: mean nats per pixel by name of the class.
    """
    figure = _new(10 if by_class else 5.2, 4.2)
    by_position, *by_name = np.atleast_1d(figure.subplots(1, 2 if by_class else 1))
    image = by_position.imshow(nats_YX, cmap="magma", interpolation="none", vmax=np.nanquantile(nats_YX, 0.99))
    figure.colorbar(image, ax=by_position, label="nats per pixel", extend="max")  # the first pixel is off the scale
    by_position.set_xlabel("column")
    by_position.set_ylabel("row")
    for axes in by_name:
        names = sorted(by_class, key=by_class.__getitem__, reverse=True)
        axes.barh([label(name) for name in names], [by_class[name] for name in names], color="tab:blue", height=0.7)
        axes.bar_label(axes.containers[0], fmt="%.3f", padding=3, fontsize=8)
        axes.margins(x=0.12)
        _plain(axes, "nats per pixel", "class")
    _save(path, figure)
