"""The page: a card of what came out, pictures over training, runs compared, and a section for each run."""

import datetime
import functools
import importlib.resources
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from igpt_jax.config.evaluation import COMPLETION_MEASURES
from igpt_jax.metrics import charts, figures
from igpt_jax.metrics.charts import Chart
from igpt_jax.report import comparison, paper, pictures
from igpt_jax.report.runs import Row, Run, most_accurate, whole
from igpt_jax.scaling import charts as scaling

ROWS_SHOWN = 200  # of a table
HIDDEN = ("asked", "identity", "data", "draws", "bytes")  # columns that say nothing to a reader
SHARES = re.compile(r"accuracy|(?<!frechet_)interval|deviation|goodput|\bmfu\b|share")
NAMES = {"eval/nats_per_pixel": "held-out nats per pixel", "train/nats_per_pixel": "training nats per pixel",
         "interval": "95 % interval", "probe_interval": "95 % interval", "eval/accuracy": "held-out accuracy",
         "eval/ema_nats_per_pixel": "held-out nats per pixel, averaged parameters",
         "eval/bits_per_dim": "held-out bits per dimension", "train/bits_per_dim": "training bits per dimension",
         "eval/ema_bits_per_dim": "held-out bits per dimension, averaged parameters",
         "bits_per_dim": "bits per dimension",
         "held_out_accuracy": "held-out accuracy", "mfu": "MFU",
         "model_tflops_per_second_per_device": "model TFLOP/s per device"}


class Tile(NamedTuple):
    """One result on the card."""
    name: str
    value: str
    sentence: str


def render(runs: Sequence[Run]) -> tuple[str, dict[str, str]]:
    """The page, and its charts as SVG by file name."""
    drawn: dict[str, str] = {}

    def draw(owner: str, found: Sequence[Chart]) -> list[tuple[str, markupsafe.Markup]]:
        svgs = [(chart.name, svg) for chart in found if (svg := figures.svg(chart))]
        drawn.update({f"{owner}-{name.replace(' ', '-')}.svg": svg for name, svg in svgs})
        return [(name.capitalize(), markupsafe.Markup(svg)) for name, svg in svgs]

    compared, strips = comparison.comparisons(runs), pictures.strips(runs)
    in_comparison = {run.title for each in compared for run, *_ in each.rows}
    sections = [{**_section(run, runs), "compared": run.title in in_comparison,
                 "charts": draw(f"{number:02d}-{run.job}", whole(run, "charts", [], _charts, run))}
                for number, run in enumerate(runs, 1)]
    page = _template().render(
        tiles=[tile for make in (_loss, _probe, _finetuned) for tile in make(runs)],
        card=pictures.newest_completions(strips), over_training=[each for each in strips if each.steps > 1],
        comparisons=[(each, draw(f"compared-{index}", each.charts)) for index, each in enumerate(compared, 1)],
        sections=sections, hues=figures.HUES, paper=paper.FIGURES, made=datetime.datetime.now(datetime.UTC))
    return page, drawn


def _section(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """What page.html shows of a run besides its charts."""
    drawn = [whole(run, f"picture {file.name}", None, pictures.picture, file) for file in run.pictures]
    return {"run": run, "device": _mapping(run.result.get("device")), "versions": _mapping(run.result.get("versions")),
            "seconds": {name.removeprefix("seconds/"): seconds for name, seconds in run.goodput.items()
                        if name.startswith("seconds/") and seconds > 0},
            "sentences": whole(run, "comparison with the paper", [], paper.sentences, run, runs),
            "results": [(name, value) for name, value in run.metrics.items() if name not in paper.SAID and not any(
                isinstance(each, Mapping) for each in (value if isinstance(value, list) else [value]))],
            "tables": [(name, *_table(rows)) for name, rows in run.tables.items()],
            "pictures": [picture for picture in drawn if picture]}


def _mapping(value: Any) -> Row:
    return value if isinstance(value, Mapping) else {}


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"shown": shown, "named": named}
    return environment.from_string((importlib.resources.files("igpt_jax.report") / "page.html").read_text("utf-8"))


# The card.

def _on(what: str, run: Run, tiles: Sequence[Run]) -> str:
    """The name of a tile; of several with the data set, the last part of the store's path."""
    return f"{what}, {run.store.rstrip('/').rpartition('/')[2]}" if len(tiles) > 1 else what


def _bits(metrics: Row) -> str:
    bits = metrics.get("eval/bits_per_dim")
    return f", {bits:.3f} bits per dimension" if charts.finite(bits) else ""


def _loss(runs: Sequence[Run]) -> list[Tile]:
    """One of each objective and data set, since losses of others do not compare."""
    metric, kinds = "eval/nats_per_pixel", {}
    for run in runs:
        if run.job == "pretrain" and charts.finite(run.metrics.get(metric)):
            kinds.setdefault((run.values.get("objective"), run.data), []).append(run)
    best = [min(same, key=lambda run: run.metrics[metric]) for same in kinds.values()]
    return [Tile(_on("Held-out loss", run, best), f"{run.metrics[metric]:.3f}",
                 f"nats per pixel{_bits(run.metrics)}: {run.title}, step {shown(run.metrics.get('steps'))}, "
                 f"{shown(run.metrics.get('parameters'))} parameters") for run in best]


def _probe(runs: Sequence[Run]) -> list[Tile]:
    found, best = [], most_accurate(runs, "probe")
    for run in best:
        others = [f"{name} {shown(run.metrics[key], key)}" for key, name in
                  (("raw_pixel_accuracy", "raw pixels"), ("untrained_accuracy", "untrained model"))
                  if run.metrics.get(key) is not None]
        found.append(Tile(_on("Linear probe", run, best), shown(run.metrics["test_accuracy"], "accuracy"), "; ".join(
            [f"test accuracy of layer {run.metrics.get('best_layer')}: {run.title}", *others])))
    return found


def _finetuned(runs: Sequence[Run]) -> list[Tile]:
    best = most_accurate(runs, "finetune")
    return [Tile(_on("Fine-tuned", run, best), shown(run.metrics["test_accuracy"], "accuracy"),
                 f"test accuracy: {run.title}, step {shown(run.metrics.get('best_step') or run.metrics.get('steps'))}")
            for run in best]


# A run.

def _charts(run: Run) -> list[Chart]:
    found = []
    if run.lines:
        found += charts.training(run.lines, run.values.get("steps", 0)) + charts.telemetry(run.lines)
    if rows := run.by_layer:
        others = {name: run.metrics[key] for key, name in
                  (("raw_pixel_accuracy", "raw pixels"), ("untrained_accuracy", "untrained model"))
                  if run.metrics.get(key) is not None}
        found.append(charts.accuracy_by_layer([("", "layers, 95 % intervals", rows)], others))
    if rows := run.tables.get("scaling.json"):
        measures = ("nats_per_pixel", "probe_accuracy", *COMPLETION_MEASURES)
        found += [*(scaling.profiles(rows, measure) for measure in measures), *scaling.frontier(run.metrics)]
    return found + charts.evaluation(run.tables.get("evaluation.json", ()))


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]], int]:
    """Columns, cells, and how many rows are left out. Digests, and tables in tables, are left out."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN
               and not any(isinstance(each, Mapping) for row in rows if isinstance(row.get(name), list)
                           for each in row[name])]
    return columns, [[row.get(name) for name in columns] for row in rows[:ROWS_SHOWN]], max(0, len(rows) - ROWS_SHOWN)


def named(name: str) -> str:
    """A column's or metric's name as people read it."""
    return NAMES.get(name, name.replace("_", " "))


def shown(value: Any, name: str = "") -> str:
    """A value as people read it; per cent if its name says that it is a share."""
    if value is None or value == []:
        return "–"
    if isinstance(value, list | tuple):
        return (" to " if "interval" in name and len(value) == 2 else ", ").join(shown(each, name) for each in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if SHARES.search(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.5g}"
