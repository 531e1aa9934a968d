"""Fits the planner's speed to training steps that others measured, and tells how far its predictions are off.

    python benchmarks/roofline.py [--compile] [--python cuda/bin/python] [--only TEXT]

Reads benchmarks/measurements.json: what was published, where, what had to be assumed, and a config of `plan` that
stands in for it, with the same layers, width and weights per layer, mesh, remat and tokens per device. Pictures are
square, so 2,048 tokens are 48x48 and 8,192 are 96x96. A gated MLP or shared keys are an MLP of as many weights.

MFU counts as everywhere here (`model/flops.py`): 6 x weights of matrices + 6 x layers x tokens x width FLOPs per token,
which is half of attention, over the bf16 peak in `parallel/topology.py`.

A stand-in's FLOPs and bytes are those of its compiled program, as `plan` counts them. --compile adds missing ones to
docs/roofline.json. The fit, each row's prediction by a fit without it, and the table of docs/scaling.md follow.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import statistics
from urllib.parse import urlsplit

import exits
import numpy as np
import pages
from tqdm import tqdm

from igpt_jax import storage
from igpt_jax.config import PlanConfig, UserError, base_config, parse
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.parallel import topology
from igpt_jax.planner.estimate import estimate
from igpt_jax.planner.roofline import Forecast, Speed, forecast
from igpt_jax.planner.verdicts import verdict_for

DATA = pathlib.Path(__file__).with_name("measurements.json")
RESULT = pathlib.Path(__file__).parent.parent / "docs" / "roofline.json"
PAGE = RESULT.with_name("scaling.md")
MARKS = "<!-- measurements: made by benchmarks/roofline.py -->", "<!-- end of the measurements -->"
FIGURES = ("flops", "memory_bytes", "collective_bytes")
WITHIN = 0.8  # share of the measurements that an interval holds


def config_of(row: dict) -> PlanConfig:
    """The stand-in; those who published the measurements loop over layers."""
    return parse("plan", base_config("plan", f"{row['plan']},model.unroll=1"))


def measured_mfu(row: dict) -> float:
    """MFU of the published run itself, with half of causal attention."""
    weights = row["layers"] * row["layer_weights"] + row["vocabulary"] * row["embed"]
    flops = 6 * weights + 6 * row["layers"] * row["tokens"] * row["embed"]
    return row["tokens_per_second_per_device"] * flops / topology.parse(config_of(row).topology).chip.peak_bf16_flops


def parts(row: dict, found: dict) -> tuple[Forecast, float]:
    """The stand-in's seconds at peak, by part, and the seconds that it takes at the measured MFU."""
    config = config_of(row)
    target, model = topology.parse(config.topology), config.model
    guess = estimate(config)
    at_peak = forecast(target, config.mesh.sizes, guess.busy_flops(config, target.chip, found["flops"]),
                       found["memory_bytes"], found["collective_bytes"])
    flops = config.batch_size * train_flops_per_image(model.layers, model.embed, model.mlp, config.palette_size,
                                                      config.image_size ** 2)
    return at_peak, flops / target.devices / target.chip.peak_bf16_flops / measured_mfu(row)


def fit(cases: list[tuple[Forecast, float]]) -> Speed:
    """The speed with the least sum of squared relative errors."""
    columns = np.array([[part.compute_seconds, part.memory_seconds, part.overlapped_seconds] for part, _ in cases])
    seconds = np.array([seconds for _, seconds in cases])
    exposed = np.array([part.exposed_seconds for part, _ in cases])
    found, *_ = np.linalg.lstsq(columns / seconds[:, None], 1 - exposed / seconds)
    return Speed(*map(float, found))


def left_out(cases: list[tuple[Forecast, float]], groups: list) -> list[Speed]:
    """The fit without the group of each case."""
    return [fit([case for case, other in zip(cases, groups, strict=True) if other != group]) for group in groups]


def errors(cases: list[tuple[Forecast, float]], speeds: list[Speed]) -> list[float]:
    """Measured over predicted seconds, which is predicted over measured MFU."""
    return [seconds / speed.seconds(part) for (part, seconds), speed in zip(cases, speeds, strict=True)]


def median_error(ratios: list[float]) -> float:
    """The median relative error of the predicted MFU."""
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def result_of(rows: list[dict], known: dict[str, dict]) -> dict:
    """The fit, its errors and every row's prediction. `known` holds compiled figures by stand-in."""
    if missing := [row["name"] for row in rows if row["plan"] not in known]:
        raise UserError(f"not compiled yet: {', '.join(missing)}. Use --compile, with --python for the GPU rows.")
    cases = [parts(row, known[row["plan"]]) for row in rows]
    speeds = left_out(cases, list(range(len(rows))))
    ratios = errors(cases, speeds)
    sources = ["/".join(urlsplit(row["source"]).path.split("/")[:3]) for row in rows]
    low = np.quantile(ratios, (1 - WITHIN) / 2, method="lower")
    high = np.quantile(ratios, (1 + WITHIN) / 2, method="higher")
    speed = dataclasses.replace(fit(cases), low=math.floor(100 * low) / 100, high=math.ceil(100 * high) / 100)
    formula = [estimate(config_of(row)) for row in rows]
    searched = errors([parts(row, vars(guess)) for row, guess in zip(rows, formula, strict=True)], speeds)
    return {
        "speed": {name: round(getattr(speed, name), 3) for name in ("compute", "memory", "overlapped", "low", "high")},
        "median_error": median_error(ratios),
        "median_error_without_the_source": median_error(errors(cases, left_out(cases, sources))),
        "in_interval": sum(speed.low <= ratio <= speed.high for ratio in ratios),
        "by_formula": {"median_error": median_error(searched), "median_ratio": statistics.median(searched)},
        "rows": [{"name": row["name"], "measured_mfu": measured_mfu(row), "predicted_mfu": measured_mfu(row) * ratio}
                 for row, ratio in zip(rows, ratios, strict=True)],
        "compiled": known,
    }


def table(rows: list[dict], result: dict) -> str:
    """The rows as Markdown."""
    low, high = result["speed"]["low"], result["speed"]["high"]
    lines = ["| run | published | measured MFU, % | predicted without this row, % | assumed |", "|---|---|---|---|---|"]
    for row, found in zip(rows, result["rows"], strict=True):
        mfu = 100 * found["predicted_mfu"]
        lines.append(f"| [{row['name']}]({row['source']}) | {row['published']} | {100 * found['measured_mfu']:.0f} | "
                     f"{mfu:.0f} ({mfu / high:.0f} to {mfu / low:.0f}) | {row['assumed']} |")
    return "\n".join(lines)


def compiled(rows: list[dict], known: dict[str, dict], python: str, only: str) -> dict[str, dict]:
    """Compiles the stand-ins that are not known yet; those for GPUs with `python`."""
    for row in tqdm([row for row in rows if only in row["name"] and row["plan"] not in known], disable=None):
        config = config_of(row)
        if topology.parse(config.topology).platform == "gpu":
            if not python:
                continue
            config = dataclasses.replace(config, python=python)
        verdict = verdict_for(config)
        print(row["name"], verdict.status, verdict.message, flush=True)
        if verdict.status == "compiled":
            known = known | {row["plan"]: {name: getattr(verdict, name) for name in FIGURES}}
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile the stand-ins that are not in the result yet")
    parser.add_argument("--python", default="", help="interpreter with jax[cuda13], for the GPU rows")
    parser.add_argument("--only", default="", help="compile only rows whose name holds this text")
    options = parser.parse_args()
    rows = exits.read_json(DATA)
    plans = {row["plan"] for row in rows}
    known = exits.read_json(RESULT)["compiled"] if RESULT.exists() else {}
    known = {plan: figures for plan, figures in known.items() if plan in plans}
    if options.compile:
        known = compiled(rows, known, options.python, options.only)
    result = result_of(rows, known)
    storage.publish(storage.path(os.fspath(RESULT)), json.dumps(result, indent=1) + "\n")
    pages.replace(PAGE, MARKS, table(rows, result))
    print({name: value for name, value in result.items() if name not in ("rows", "compiled")})


if __name__ == "__main__":
    exits.run(main)
