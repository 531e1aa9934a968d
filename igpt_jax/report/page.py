"""One self-contained HTML page of any set of workdirs: no scripts, no network, light and dark, for screen and paper."""

import base64
import datetime
import functools
import importlib.resources
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.metrics.logging import say
from igpt_jax.report import charts, paper
from igpt_jax.report.charts import Series
from igpt_jax.report.runs import Row, Run

PNG = b"\x89PNG\r\n\x1a\n"
ROWS_SHOWN = 200  # of a table
DIGESTS = ("asked", "identity", "data")  # columns of evaluation.json that say nothing to a reader
CHARTS = (  # of training: title, metrics with their labels, unit
    ("Loss", (("train/nats_per_pixel", "training, per pixel"), ("eval/nats_per_pixel", "held out, per pixel"),
              ("train/classification_nats", "classification, per image")), "nats"),
    ("Accuracy", (("train/accuracy", "training"), ("eval/accuracy", "held out")), "share of images"),
    ("Learning rate", (("train/learning_rate", "learning rate"),), "learning rate"),
    ("Throughput", (("images_per_second", "images"),), "images per second"),
    ("Gradient norm", (("train/gradient_norm", "gradient norm"),), "L2 norm"),
)


class Chart(NamedTuple):
    title: str
    svg: str


def render(found: Sequence[Run]) -> tuple[str, dict[str, str]]:
    """The page, and its charts as SVG by file name."""
    drawn: dict[str, str] = {}
    sections = []
    for number, run in enumerate(found, 1):
        mine = [chart for chart in _whole(run, "charts", lambda run=run: _charts(run)) if chart.svg]
        drawn |= {f"{number:02d}-{run.job}-{chart.title.lower().replace(' ', '-')}.svg": chart.svg for chart in mine}
        device, versions = (run.result.get(name) for name in ("device", "versions"))
        sections.append({
            "run": run, "charts": [(chart.title, markupsafe.Markup(chart.svg)) for chart in mine],
            "device": device if isinstance(device, Mapping) else {},
            "versions": versions if isinstance(versions, Mapping) else {},
            "sentences": _whole(run, "comparison with the paper", lambda run=run: paper.sentences(run, found)),
            "figures": _scalars(run.metrics),
            "tables": [(name, *_table(rows)) for name, rows in run.tables.items()],
            "pictures": [picture for file in run.pictures
                         for picture in _whole(run, f"picture {file.name}", lambda file=file: [_picture(file)])]})
    page = _template().render(sections=sections, paper=paper.FIGURES, made=datetime.datetime.now(datetime.UTC),
                              jobs=sorted({run.job for run in found}))
    return page, drawn


def _whole(run: Run, what: str, make: Callable[[], list[Any]]) -> list[Any]:
    """What `make` makes of a run's files; nothing where they are not what a job writes, as a line then says."""
    try:
        return make()
    except (UserError, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        say(f"{run.path}: its {what} is left out, because a file is damaged: {' '.join(str(error).split())}")
        return []


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters["shown"] = shown
    return environment.from_string((importlib.resources.files("igpt_jax.report") / "page.html").read_text("utf-8"))


def _charts(run: Run) -> list[Chart]:
    found = []
    for title, metrics, unit in CHARTS:
        series = [Series(label, *run.series(name)) for name, label in metrics]
        series = [one._replace(dots=len(one.x) < 25) for one in series if one.x]
        if any(len(one.x) > 1 for one in series):
            found.append(Chart(title, charts.lines(series, "steps", unit)))
    if spent := {name.removeprefix("seconds/"): seconds for name, seconds in run.goodput.items()
                 if name.startswith("seconds/") and seconds > 0}:
        found.append(Chart("Where the time went", charts.split_bar(spent, "seconds, over all restarts")))
    by_layer = run.by_layer
    if len(by_layer) > 1:
        accuracy = Series("layers, 95 % intervals", [row["layer"] for row in by_layer],
                          [100 * row["test_accuracy"] for row in by_layer],
                          [tuple(100 * bound for bound in row["interval"]) for row in by_layer], dots=True)
        levels = {name: 100 * run.metrics[key] for key, name in
                  (("raw_pixel_accuracy", "raw pixels"), ("untrained_accuracy", "untrained model"))
                  if run.metrics.get(key) is not None}
        found.append(Chart("Accuracy by layer", charts.lines([accuracy], "layer (0: the embedding)", "test accuracy, %",
                                                             levels)))
    return found


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) of all figures, those in groups by both names."""
    found = []
    for name, value in metrics.items():
        found += _scalars(value, f"{prefix}{name} ") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]], int]:
    """Columns, cells, and how many rows are left out. Columns of digests and of tables in tables are left out."""
    rows = [row for row in rows if isinstance(row, Mapping)]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in DIGESTS
               and not any(isinstance(each, Mapping) for row in rows if isinstance(row.get(name), list)
                           for each in row[name])]
    return columns, [[row.get(name) for name in columns] for row in rows[:ROWS_SHOWN]], max(0, len(rows) - ROWS_SHOWN)


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.5g}"


def _picture(file: storage.Path) -> tuple[str, str, bool]:
    """Name, data URL, and whether it is narrower than its place, so that its pixels are to be seen as squares."""
    data = storage.read(file)
    if not data.startswith(PNG):
        raise ValueError("it is no PNG")
    width = int.from_bytes(data[16:20], "big")  # PNG: 8 bytes of signature, then the header chunk
    return file.stem.replace("_", " "), f"data:image/png;base64,{base64.b64encode(data).decode()}", width < 480
