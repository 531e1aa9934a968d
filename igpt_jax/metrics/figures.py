"""Draws charts and images: PNG files for workdirs, SVG for the report.

Every function that uses Matplotlib is decorated with `drawn`: it runs with Matplotlib's defaults, whatever the user has
set. A figure that cannot be drawn costs one line on stderr, never the job.

N images, Y rows, X columns, C channels.
"""

import contextlib
import functools
import html
import io
import itertools
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from igpt_jax import storage
from igpt_jax.metrics.charts import Chart, Series
from igpt_jax.metrics.logging import say

# Both read well on white and on black, and differ for the color-blind in lightness too.
HUES = ("#3b82f6", "#f59e0b", "#ef4444", "#10b981", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16", "#64748b", "#a16207")
DASHES = ("--", ":", "-.", (0, (6, 3)))
# An SVG takes the colors of the page around it: what is drawn in these becomes the page's text and grid.
TEXT, GRID = "#010203", "#040506"
STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "igpt", "font.size": 9,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False}
PAGE_STYLE = {"text.color": TEXT, "axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT,
              "ytick.color": TEXT}
LONGEST_LABEL = 60  # characters of a legend
LETTER, HANDLE, LINE = 4.4, 40, 0.165  # of a legend: width of a letter and of a line's sample, points; height, inches
STRIP = 5.0  # width of the strips of an SVG that show values under the pointer, in points


# Matplotlib. Its object interface needs neither pyplot nor a display. It is imported on first use: that takes a while,
# and most runs draw nothing until they end.

def drawn(draw: Callable) -> Callable:
    """Decorates a function that draws: it runs with Matplotlib's defaults and STYLE.

    If the function raises, a line on stderr says so, and the decorated function returns None. The line names the
    function's first argument, a file or a chart.
    """
    @functools.wraps(draw)
    def harmless(what: Any, *arguments: Any, **named: Any) -> Any:
        try:
            with _defaults():
                return draw(what, *arguments, **named)
        except Exception as error:  # of any kind: no figure is worth a run
            why = " ".join(str(error).split())
            say(f"The figure {what.name!r} cannot be drawn: {why}. The job continues without it.")
    return harmless


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
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
        matplotlib.rcParams.update(STYLE)  # names may contain $, which the default reads as a formula
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


def _new(width: float, height: float, dpi: int = 150) -> Any:
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _save(path: storage.Path, figure: Any) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.publish(path, png.getvalue())


# Charts.

@drawn
def save(path: storage.Path, *charts: Chart, title: str = "") -> None:
    """Draws charts side by side as one PNG. Those with a lone dot are left out; without any other, so is the file, and
    a former one is removed."""
    charts = [chart for chart in charts if chart.drawable]
    if not charts:
        return path.unlink(missing_ok=True)
    width = 6.4 if len(charts) == 1 else 4.8
    figure = _new(width * len(charts), 3.4 + LINE * max(_legend(chart, width)[1] for chart in charts))
    if title:
        figure.suptitle(label(title, 100), fontsize=11)
    for panel, chart in zip(np.atleast_1d(figure.subfigures(1, len(charts))), charts, strict=True):
        _draw(panel, chart, "0.92", width)
    _save(path, figure)


@drawn
def svg(chart: Chart) -> str | None:
    """The chart as an SVG element that takes its colors and size from the page; None if it has a lone dot.

    A pointer over it shows the values there, by a style rule alone.
    """
    import matplotlib

    if not chart.drawable:
        return None
    matplotlib.rcParams.update(PAGE_STYLE)
    width = 4.8  # small, so that its letters can be read on a phone
    figure, file = _new(width, 2.8 + LINE * _legend(chart, width)[1], dpi=72), io.StringIO()
    axes = _draw(figure, chart, GRID, width)
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    head, rest = text[text.index("<svg"):].split(">", 1)
    box = head[head.index("viewBox="):].split('"')[1]
    rest = rest.replace(TEXT, "currentColor").replace(GRID, "var(--grid, #ddd)")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
            f'role="img" aria-label="{html.escape(label(chart.name))}">{rest[:rest.rindex("</svg>")]}'
            f"{''.join(_strips(axes, chart, figure.bbox.height))}</svg>")


def _legend(chart: Chart, width: float) -> tuple[int, int]:
    """Columns and rows of a chart's legend below axes of that width in inches."""
    labels = [label(text) for text in (*chart.levels, *(series.label for series in chart.series)) if text]
    columns = 2 if 2 * (HANDLE + LETTER * max(map(len, labels), default=0)) <= 72 * width else 1
    return columns, math.ceil(len(labels) / columns)


def _draw(figure: Any, chart: Chart, grid: str, width: float) -> Any:
    """Draws one chart into a figure, or a part of one, of that width in inches. Returns its axes."""
    import matplotlib.ticker

    axes = figure.subplots()
    for series in chart.series:
        points, style = list(zip(*series.points, strict=True)) or [(), ()], {"color": HUES[series.hue % len(HUES)]}
        errors = None
        if series.spread:
            errors = np.abs(np.float64(series.spread) - np.float64(points[1])[:, None]).T
        axes.errorbar(*points, yerr=errors, alpha=0.25 + 0.75 * series.shade, label=label(series.label) or None,
                      linewidth=1.4 if series.line else 0, elinewidth=1.1, capsize=2.5,
                      marker="o" if series.dots else None, markersize=3.5 if series.line else 7, **style)
        for point, note in zip(series.points, series.notes, strict=False):
            axes.annotate(note, point, textcoords="offset points", xytext=(5, -11), fontsize=8, alpha=0.75)
    for (name, level), dashes in zip(chart.levels.items(), itertools.cycle(DASHES), strict=False):
        axes.axhline(level, color="0.5", linestyle=dashes, linewidth=1.1, label=label(name))
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_title(label(chart.note, 80), fontsize=9)
    if chart.falling:
        axes.invert_xaxis()
    if chart.log_y:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(matplotlib.ticker.LogFormatter())  # the default writes 10^n as a formula
    if chart.log_x:
        axes.set_xscale("log", base=chart.log_x)
    if chart.log_x == 10:
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+0", "e")
                                                                       .replace("e+", "e")))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    elif chart.log_x:
        ticks = [x for x, _ in chart.series[0].points]
        ticks = ticks[::1 + len(ticks) // 8]
        axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    elif all(float(x).is_integer() for series in chart.series for x, _ in series.points):
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    columns, rows = _legend(chart, width)
    if rows:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8)  # outside, where it hides no curve
    return axes


def _strips(axes: Any, chart: Chart, height: float) -> Iterator[str]:
    """For each few points of width, a strip that shows the values there while the pointer is over it, and its style."""
    box = axes.get_window_extent()
    top, bottom, columns = height - box.y1, height - box.y0, {}
    for series in chart.series:
        for index, point in enumerate(series.points):
            across, up = axes.transData.transform(point)
            columns.setdefault(round(across / STRIP), []).append((point[0], across, height - up, series, index))
    places = sorted(columns)
    edges = [box.x0, *((one + other) / 2 * STRIP for one, other in itertools.pairwise(places)), box.x1]
    name = chart.x.split(",")[0].split(" (")[0]
    yield "<style>.strip>g{visibility:hidden}.strip:hover>g{visibility:visible}</style>"
    for place, (left, right) in zip(places, itertools.pairwise(edges), strict=True):
        # Points of one strip can differ in x. Those of the most frequent x are shown, so that all values belong to it.
        (x, _), = Counter(each[0] for each in columns[place]).most_common(1)
        here = [each for each in columns[place] if each[0] == x]
        yield (f'<g class="strip"><rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
               f'height="{bottom - top:.1f}" fill="transparent"/><g pointer-events="none">'
               f'<path d="M{here[0][1]:.1f} {top:.1f}V{bottom:.1f}" stroke="currentColor" stroke-opacity="0.4"/>')
        rows = [("currentColor", f"{name} {x:,.6g}")]
        for _, across, down, series, index in here:
            color = HUES[series.hue % len(HUES)]
            yield f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{color}"/>'
            rows.append((color, _value(chart, series, index)))
        yield from _box(rows, here[0][1], box.x0, box.x1, top)
        yield "</g></g>"


def _value(chart: Chart, series: Series, index: int) -> str:
    """A point in words, such as `held-out 2.345`."""
    words = [series.label.split(": ")[0], format(series.points[index][1], chart.value)]
    if series.spread:
        words.append("({:{v}} to {:{v}})".format(*series.spread[index], v=chart.value))
    return " ".join(filter(None, words + [f"step {note}" for note in series.notes[index:index + 1]]))


def _box(rows: Sequence[tuple[str, str]], at: float, left: float, right: float, top: float) -> Iterator[str]:
    """Lines of text in a box beside x = `at`, on the side with more room."""
    rows = [(color, label(text)) for color, text in rows]
    width = 12 + 4.6 * max(len(text) for _, text in rows)
    x = min(at + 6, right - width) if at < (left + right) / 2 else max(at - 6 - width, left)
    yield (f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{6 + 11 * len(rows)}" rx="3" '
           'fill="var(--paper, #fff)" fill-opacity="0.92" stroke="var(--grid, #ddd)"/>')
    for line, (color, text) in enumerate(rows):
        down = top + 11 * (line + 1)
        if line:
            yield f'<circle cx="{x + 6:.1f}" cy="{down - 3:.1f}" r="2.5" fill="{color}"/>'
        yield (f'<text x="{x + (11 if line else 5):.1f}" y="{down:.1f}" fill="currentColor" '
               f'font-size="8">{html.escape(text)}</text>')


# Images.

def image_grid(images_NYXC: np.ndarray, columns: int, scale: int = 4, gap: int = 2,
               headings: Sequence[str] = ()) -> Image.Image:
    """Arranges images in rows, with white gaps between them.

    Args:
      images_NYXC: uint8, RGB.
      columns: images per row.
      scale: side of the sharp square that each pixel becomes, in pixels.
      gap: width of the gaps, in pixels.
      headings: of the first columns, each centered up to the next; empty: none.
    """
    big = images_NYXC.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = big.shape
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(big):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top:top + height, left:left + width] = image
    return _with_headings(grid, headings, width + gap, gap) if headings else Image.fromarray(grid)


def _with_headings(grid_YXC: np.ndarray, headings: Sequence[str], width: int, gap: int) -> Image.Image:
    size = max(8, width // 6)
    picture = Image.fromarray(np.pad(grid_YXC, ((size + 2 * gap, 0), (0, 0), (0, 0)), constant_values=255))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for column, heading in enumerate(headings):
        right = column + 1 if column + 1 < len(headings) else (picture.width + gap) // width  # the last spans the rest
        pen.text(((column + right) / 2 * width - gap / 2, gap), heading, "black", font, anchor="ma")
    return picture


def save_png(path: storage.Path, image: Image.Image) -> None:
    """Writes a Pillow image as a PNG file, to a local path or a bucket."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    storage.publish(path, png.getvalue())


@drawn
def loss_maps(path: storage.Path, images_NYXC: np.ndarray, nats_NYXC: np.ndarray, names: Sequence[str] = ()) -> None:
    """Draws each image with its per-pixel loss as a heat map to its right, and one more for each of several channels.

    Args:
      path: of the PNG.
      images_NYXC: uint8, RGB.
      nats_NYXC: nats of each token, given the tokens before it; a pixel has one or more.
      names: of the images' classes; empty: none.
    """
    from matplotlib import cm, colormaps, colors

    nats_NYX, channels = nats_NYXC.sum(axis=-1), nats_NYXC.shape[-1]
    scale = colors.Normalize(0, np.nanquantile(nats_NYX, 0.995))  # so that one outlier does not darken the rest
    maps = [nats_NYX, *(np.moveaxis(nats_NYXC, -1, 0) if channels > 1 else ())]
    heat_NYXC = np.concatenate([np.uint8(255 * colormaps["magma"](scale(each).clip(0, 1))[..., :3]) for each in maps],
                               axis=2)
    columns = min(4 if channels == 1 else 2, len(images_NYXC))
    rows = math.ceil(len(images_NYXC) / columns)
    pairs = itertools.zip_longest(np.concatenate([images_NYXC, heat_NYXC], axis=2), nats_NYX, names)
    figure = _new((2.1 if channels == 1 else 5.2) * columns + 0.9, 1.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (pair, nats, name) in itertools.zip_longest(panels.flat, pairs, fillvalue=(None, None, None)):
        axes.axis("off")
        if pair is not None:
            axes.imshow(pair, interpolation="none")
            axes.set_title(label(f"{name + ', ' if name else ''}{np.nanmean(nats):.2f}", 24), fontsize=9)
    unit = "nats per pixel" + (", then of each channel" if channels > 1 else "")
    figure.colorbar(cm.ScalarMappable(scale, "magma"), ax=panels, label=unit, fraction=0.04, pad=0.01)
    _save(path, figure)


@drawn
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
    by_position.set(xlabel="column", ylabel="row")
    for axes in by_name:
        names = sorted(by_class, key=by_class.__getitem__, reverse=True)
        axes.barh([label(name, 24) for name in names], [by_class[name] for name in names], color=HUES[0], height=0.7)
        axes.bar_label(axes.containers[0], fmt="%.3f", padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.set(xlabel="nats per pixel", ylabel="class")
        axes.grid(axis="x", color="0.92", linewidth=0.8)
    _save(path, figure)
