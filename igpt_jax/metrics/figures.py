"""Figures of runs and of finished jobs, as PNG.

All that is drawn with Matplotlib, here and for reports, is `drawn` with its own defaults, whatever the user has set;
a drawing that fails is told in one line and never fails a job.

N pictures, Y rows, X columns, C channels, V palette.
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
CURVES = 10  # in one figure, at most: as many as there are colors
LONGEST_LABEL = 40  # characters: two columns of a legend


# Matplotlib. Its object interface needs neither pyplot nor a display; it is imported where something is drawn.

def drawn(**settings: Any) -> Callable[[Callable], Callable]:
    """Decorates what draws: it runs with Matplotlib's defaults and `settings`. Where it fails, a line says so, and it
    returns None."""
    def decorate(draw: Callable) -> Callable:
        @functools.wraps(draw)
        def harmless(*arguments: Any, **named: Any) -> Any:
            try:
                with _defaults(settings):
                    return draw(*arguments, **named)
            except Exception as error:  # whatever it is, a picture is not worth a run
                what = draw.__name__.replace("_", " ")
                say(f"The picture {what!r} cannot be drawn: {' '.join(str(error).split())}. The job goes on without.")
        return harmless
    return decorate


@contextlib.contextmanager
def _defaults(settings: Mapping[str, Any]) -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of the user's settings, and of its font cache
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may be missing here: the import would fail
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with warnings.catch_warnings(action="ignore"), matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, **settings})  # names may hold any number of $
        yield


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """`text` as Matplotlib can show it: characters without a glyph as escapes, long ones cut in the middle."""
    glyphs = _glyphs()
    text = "".join(char if ord(char) in glyphs else char.encode("unicode_escape").decode() for char in text)
    if len(text) > longest:
        text = f"{text[:longest // 2 - 1]}…{text[-longest // 2:]}"
    return f"\u200b{text}" if text.startswith("_") else text  # legends leave out what begins with _


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that Matplotlib's own font has."""
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
    """Draws training and held-out loss over steps, with the loss of guessing, ln V, as a dashed line.

    Args:
      path: of the PNG.
      metrics: what `load_metrics` gives; reads `train/nats_per_pixel` and `eval/nats_per_pixel`.
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
    """Draws nats per pixel of checkpoints over their steps, a line for each run.

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
    """Draws the accuracy of the best layer's probe over the loss, which falls to the right (the paper's Figure 3).

    Args:
      path: of the PNG.
      runs: rows with `nats_per_pixel`, `steps`, `probe_accuracy` and its interval, by name of the run.
      test_count: examples that the accuracies count.
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
      others: accuracy by name.
      test_count: examples counted.
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
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # nothing is drawn over
    _save(path, figure)


def _some(axes: Any, curves: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
    """All curves; of more than CURVES those at even distances, and then a title that says so."""
    shown = np.unique(np.linspace(0, len(curves) - 1, CURVES).round().astype(int))
    if len(shown) < len(curves):
        axes.set_title(f"{len(shown)} of {len(curves)} {what}", fontsize=10)
    return [list(curves.items())[index] for index in shown]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _spreads(rows: Sequence[Mapping[str, Any]], accuracy: str, interval: str) -> list[list[float]]:
    """Distances of the lower and the upper ends of intervals from the accuracies, per cent."""
    return [[100 * abs(row[interval][end] - row[accuracy]) for row in rows] for end in (0, 1)]


@drawn()
def scaling_curve(path: storage.Path, title: str, curve: Sequence[tuple[int, float, float]],
                   compiled: tuple[int, float, float], usable_bytes: int) -> None:
    """Draws seconds a step and GiB a device over device counts as a PNG.

    Args:
      path: of the PNG.
      title: of the figure.
      curve: (devices, seconds, bytes) by estimate, the best mesh at each count.
      compiled: the same of what was compiled.
      usable_bytes: of a device's memory, drawn as a line.
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


# Pictures.

def image_grid(images_NYXC: np.ndarray, columns: int, scale: int = 4, gap: int = 2) -> Image.Image:
    """The images in rows of `columns`, each pixel drawn as a sharp square of `scale` pixels, white gaps between.

    Args:
      images_NYXC: uint8, RGB.
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
    """Writes a Pillow image as PNG, to a local path or a bucket."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    storage.publish(path, png.getvalue())


@drawn()
def loss_maps(path: storage.Path, images_NYXC: np.ndarray, nats_NYX: np.ndarray) -> None:
    """Draws each picture with the nats of its pixels as a heat map to its right.

    Args:
      path: of the PNG.
      images_NYXC: uint8, RGB.
      nats_NYX: of each pixel, given those before it.
    """
    from matplotlib import cm, colormaps, colors

    scale = colors.Normalize(0, np.nanquantile(nats_NYX, 0.995))  # one freak pixel must not dim all others
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
    """Draws mean nats by place in the picture, and beside it by class, where there are any.

    Args:
      path: of the PNG.
      nats_YX: mean over a split.
      by_class: mean nats per pixel by name of the class.
    """
    figure = _new(10 if by_class else 5.2, 4.2)
    places, *others = np.atleast_1d(figure.subplots(1, 2 if by_class else 1))
    image = places.imshow(nats_YX, cmap="magma", interpolation="none", vmax=np.nanquantile(nats_YX, 0.99))
    figure.colorbar(image, ax=places, label="nats per pixel", extend="max")  # the first pixel is far above all others
    places.set_xlabel("column")
    places.set_ylabel("row")
    for axes in others:
        names = sorted(by_class, key=by_class.__getitem__, reverse=True)
        axes.barh([label(name) for name in names], [by_class[name] for name in names], color="tab:blue", height=0.7)
        axes.bar_label(axes.containers[0], fmt="%.3f", padding=3, fontsize=8)
        axes.margins(x=0.12)
        _plain(axes, "nats per pixel", "class")
    _save(path, figure)
