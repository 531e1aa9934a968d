"""What is drawn of runs and finished jobs: points, labels and axes. `figures` draws it, as PNG or SVG.

A point that is missing or not finite is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from igpt_jax import storage

Points = Sequence[tuple[float, float]]
Row = Mapping[str, Any]

CURVES = 10  # most curves of a chart: there are as many hues
CURVES_OF_A_RUN = (("train", "train/"), ("held-out", "eval/"), ("held-out, averaged parameters", "eval/ema_"))
STILL_FALLING = 0.01  # share of the held-out loss; see `trend`


class Series(NamedTuple):
    """One curve.

    Attributes:
      label: in the legend.
      points: (x, y).
      spread: (low, high) of each y; empty: none.
      hue: number of its color.
      shade: 0, pale, to 1, full.
      line: joins the points.
      dots: marks each point.
      notes: a text beside each point; empty: none.
    """
    label: str
    points: Points
    spread: Points = ()
    hue: int = 0
    shade: float = 1.0
    line: bool = True
    dots: bool = True
    notes: Sequence[str] = ()


class Chart(NamedTuple):
    """Curves over a common axis.

    Attributes:
      name: of the chart.
      x, y: labels of the axes.
      series: the curves.
      levels: y of dashed horizontal lines, by label.
      note: a line above the curves.
      falling: x falls to the right.
      log_x: base of a logarithmic x axis; 0: linear.
      log_y: the y axis is logarithmic.
      value: format of a y.
    """
    name: str
    x: str
    y: str
    series: Sequence[Series]
    levels: Mapping[str, float] = {}
    note: str = ""
    falling: bool = False
    log_x: int = 0
    log_y: bool = False
    value: str = ".4g"

    @property
    def drawable(self) -> bool:
        """Whether there is more to see than a lone dot."""
        return sum(len(each.points) for each in self.series) > 1


def points_of(rows: Iterable[Row], x: str, y: str, scale: float = 1.0) -> Points:
    """(x, scale * y) of the rows in which both are finite numbers."""
    return [(row[x], scale * row[y]) for row in rows if finite(row.get(x)) and finite(row.get(y))]


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly spaced, with the first and the last."""
    return [items[index] for index in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def trend(held_out: Points, steps: int) -> str:
    """A line that says whether a finished run was too short; empty where it was not, or is not finished.

    The rule: the last evaluation is the best one, and the held-out loss fell by more than STILL_FALLING over the last
    fifth of the steps.

    Args:
      held_out: (step, loss) of its evaluations.
      steps: that the run has in all.
    """
    before = [point for point in held_out if point[0] <= 0.8 * steps]
    if not before or held_out[-1][0] != steps or held_out[-1][1] > min(loss for _, loss in held_out):
        return ""
    then, now = np.interp(0.8 * steps, *zip(*held_out, strict=True)), held_out[-1][1]
    fall = (then - now) / then
    return f"undertrained: loss is still falling ({100 * fall:.1f} % in the last fifth)" if fall > STILL_FALLING else ""


# Training.

def _with_last(label: str, points: Points, value: str = ".3f", **style: Any) -> Series:
    """A curve whose label says its last value."""
    last = f": {points[-1][1]:{value}} at step {points[-1][0]:,}" if points else ""
    return Series(label + last, points, **style)


def training(lines: Sequence[Row], steps: int, vocabulary: int = 0, channels: int = 1) -> list[Chart]:
    """Loss over steps and, of a fine-tuning, accuracy.

    Args:
      lines: from `load_metrics`.
      steps: that the run has in all.
      vocabulary, channels: V and C; of a pretraining, draws the loss of uniform guessing, C ln V. 0: not.
    """
    def curves(metric: str, value: str, scale: float = 1.0) -> list[Series]:
        found = [_with_last(name, points_of(lines, "step", prefix + metric, scale), value, hue=hue, dots=hue > 0)
                 for hue, (name, prefix) in enumerate(CURVES_OF_A_RUN)]
        return [each for each in found if each.points]

    losses, accuracies = curves("nats_per_pixel", ".3f"), curves("accuracy", ".1f", 100)
    # The losses of a fine-tuning are far below.
    level = channels * math.log(vocabulary) if vocabulary and not accuracies else 0.0
    formula = f"{f'{channels} ' if channels > 1 else ''}ln {vocabulary}"
    loss = Chart("loss", "step", "nats per pixel", losses,
                 {f"guessing: {formula} = {level:.3f}": level} if level else {},
                 "" if accuracies else trend(points_of(lines, "step", "eval/nats_per_pixel"), steps), value=".3f")
    accuracy = Chart("accuracy", "step", "accuracy, %", accuracies, value=".1f")
    return [chart for chart in (loss, accuracy) if chart.series]


def telemetry(lines: Sequence[Row]) -> list[Chart]:
    """Classification loss, learning rate, throughput and gradient norm over steps."""
    charts = (("classification loss", "train/classification_nats", "nats per image"),
              ("learning rate", "train/learning_rate", "learning rate"),
              ("throughput", "images_per_second", "images per second"),
              ("gradient norm", "train/gradient_norm", "L2 norm"))
    return [Chart(name, "step", unit, [Series("", points_of(lines, "step", metric), dots=False)])
            for name, metric, unit in charts]


# Comparisons.

def _some(curves: Sequence[Any], what: str) -> tuple[list[Any], str]:
    """All curves; if there are more than CURVES, an evenly spaced selection, and a line that says so."""
    some = spaced(curves, CURVES)
    return some, f"{len(some)} of {len(curves)} {what}" if len(some) < len(curves) else ""


def over_steps(runs: Mapping[str, Points], name: str = "loss", unit: str = "nats per pixel",
               value: str = ".3f") -> Chart:
    """A metric of several runs over their steps, one curve per run."""
    some, note = _some([(label, [point for point in points if finite(point[1])]) for label, points in runs.items()],
                       "runs")
    return Chart(name, "step", unit, [_with_last(label, points, value, hue=hue)
                                      for hue, (label, points) in enumerate(some)], note=note, value=value)


def evaluation(rows: Sequence[Row]) -> list[Chart]:
    """The charts of evaluation.json: loss over steps and, where probed, accuracy by layer and accuracy over loss.

    Curves are labeled by the names of the workdirs, or by their paths if names repeat.
    """
    if not rows:
        return []
    runs: dict[storage.Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(storage.path(row["checkpoint"]).parent.parent, []).append(row)
    unique = len({run.name for run in runs}) == len(runs)
    named = {run.name if unique else str(run): found for run, found in runs.items()}
    loss = over_steps({run: points_of(found, "steps", "nats_per_pixel") for run, found in named.items()})
    if "probe_accuracy" not in rows[0]:
        return [loss]
    curves = [(run, f"{run}, step {row['steps']:,}", row["accuracy_by_layer"])
              for run, found in named.items() for row in found]
    counts = {row["probe_examples"] for row in rows}
    count = counts.pop() if len(counts) == 1 else 0
    return [loss, accuracy_by_layer(curves, {}, count), accuracy_over_loss(named, count)]


def accuracy_over_loss(runs: Mapping[str, Sequence[Row]], test_count: int) -> Chart:
    """The best layer's probe accuracy over the loss, which falls to the right (the paper's Figure 3).

    Args:
      runs: rows with `nats_per_pixel`, `steps`, `probe_accuracy` and its interval, by name of the run.
      test_count: test images that each accuracy is measured on; 0: unknown, or not the same.
    """
    some, note = _some([(name, [row for row in rows if finite(row["nats_per_pixel"]) and finite(row["probe_accuracy"])])
                        for name, rows in runs.items()], "runs")
    series = [Series(name, points_of(rows, "nats_per_pixel", "probe_accuracy", 100), _spread(rows, "probe_interval"),
                     hue, notes=[f"{row['steps']:,}" for row in rows]) for hue, (name, rows) in enumerate(some)]
    return Chart("accuracy over loss", "nats per pixel, falling; numbers are steps",
                 _accuracy_on(test_count), series, note=note, falling=True, value=".1f")


def accuracy_by_layer(curves: Sequence[tuple[str, str, Sequence[Row]]], others: Mapping[str, float],
                      test_count: int = 0) -> Chart:
    """Test accuracy over layers with its 95 % intervals (the paper's Figure 2).

    Args:
      curves: (run, label, rows with `layer`, `test_accuracy` and its interval). A run has one hue, and a deeper shade
        for each of its curves.
      others: accuracy of each baseline, by name.
      test_count: as in `accuracy_over_loss`.
    """
    some, note = _some(curves, "checkpoints")
    hues = {run: hue for hue, run in enumerate(dict.fromkeys(run for run, _, _ in some))}
    of_run = {name: [label for run, label, _ in some if run == name] for name in hues}
    series = [Series(label, points_of(rows, "layer", "test_accuracy", 100), _spread(rows, "interval"), hues[run],
                     (of_run[run].index(label) + 1) / len(of_run[run])) for run, label, rows in some]
    return Chart("accuracy by layer", "layer (0: the embedding)",
                 _accuracy_on(test_count), series,
                 {f"{name}: {100 * accuracy:.1f} %": 100 * accuracy for name, accuracy in others.items()}, note,
                 value=".1f")


def _accuracy_on(test_count: int) -> str:
    return f"accuracy on {test_count:,} test images, %" if test_count else "test accuracy, %"


def _spread(rows: Sequence[Row], interval: str) -> Points:
    """The intervals' lower and upper ends in per cent."""
    return [(100 * row[interval][0], 100 * row[interval][1]) for row in rows]


def scaling(curve: Sequence[tuple[int, float, float]], compiled: tuple[int, float, float],
            usable_bytes: float) -> list[Chart]:
    """Seconds per step, and memory per device, over the number of devices.

    Args:
      curve: (devices, seconds per step, bytes per device), estimated for the best mesh at each number of devices.
      compiled: the same for the step that was compiled.
      usable_bytes: memory of a device.
    """
    gib = 2**30

    def panel(name: str, unit: str, index: int, scale: float, levels: Mapping[str, float]) -> Chart:
        return Chart(name, "devices", unit, [
            Series("by formula, best mesh", [(point[0], point[index] / scale) for point in curve]),
            Series("compiled", [(compiled[0], compiled[index] / scale)], hue=1, line=False)],
            levels, log_x=2, log_y=True)

    return [panel("step time", "seconds per step", 1, 1.0, {}),
            panel("memory", "GiB per device", 2, gib, {"a device's memory": usable_bytes / gib})]
