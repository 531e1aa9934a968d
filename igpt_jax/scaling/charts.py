"""Charts of a scaling study: profiles of each budget, and the best size by budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from igpt_jax.metrics.charts import Chart, Series, points_of
from igpt_jax.scaling import analysis
from igpt_jax.scaling.study import label

Row = Mapping[str, Any]


def profiles(rows: Sequence[Row], measure: str = "nats_per_pixel") -> Chart:
    """A measure of every run over its parameters, a hue per budget, with the parabola of each budget that has a best
    size.

    Args:
      rows: the runs' rows.
      measure: nats_per_pixel, probe_accuracy (in percent), or the column of a completion score.
    """
    name, unit_name = {"nats_per_pixel": ("profiles", "held-out loss, nats per pixel"),
                       "probe_accuracy": ("probe profiles", "probe accuracy, %")}.get(
                           measure, ("completion profiles", f"completions, {measure.replace('_', ' ')}"))
    unit = 100 if measure == "probe_accuracy" else 1
    fitted = analysis.profiles(rows, measure=measure)
    series = []
    for hue, budget in enumerate(sorted({row["budget"] for row in rows})):
        here = [row for row in rows if row["budget"] == budget]
        points = sorted(points_of(here, "parameters_all", measure, unit))
        series.append(Series(f"{label(budget)} FLOPs", points, hue=hue, line=budget not in fitted))
        if points and budget in fitted:
            N = np.geomspace(points[0][0], points[-1][0], 50)
            curve = fitted[budget].value(N) * unit
            smooth = list(zip(N.tolist(), curve.tolist(), strict=True))
            series.append(Series("", smooth, hue=hue, shade=0.5, dots=False))
    return Chart(name, "parameters", unit_name, series, log_x=10)


def frontier(found: Mapping[str, Any]) -> list[Chart]:
    """The best number of parameters, and of tokens per parameter, over the budget: for the loss, and where it was
    measured for the linear probe. `found` are the results of `analysis.analyze`."""
    charts = []
    laws = (("", found.get("optima", {}).get("all", [])), (" of the probe", found.get("probe_optima", [])))
    minima = (("", found.get("profiles", [])), (" of the probe", found.get("probe_profiles", [])))
    for name, title in (("parameters", "parameters of the best size"),
                        ("tokens_per_parameter", "tokens per parameter")):
        fitted = [Series(f"fitted law{which}, 95 % interval", points_of(rows, "budget", name),
                         [tuple(row[f"{name}_interval"]) for row in rows], hue=2 * i)
                  for i, (which, rows) in enumerate(laws) if rows]
        lowest = [Series(f"parabolas{which}", points_of(rows, "budget", name), hue=2 * i + 1, line=False)
                  for i, (which, rows) in enumerate(minima) if rows]
        charts.append(Chart(title, "training FLOPs", title, [*fitted, *lowest], log_x=10, log_y=True))
    return charts
