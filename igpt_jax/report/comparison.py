"""Runs of one kind side by side: one chart, and a table of what differs in their configs and results."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from igpt_jax import storage
from igpt_jax.config import UserError, flat, key_attributes, parse, to_dict
from igpt_jax.metrics import charts
from igpt_jax.metrics.charts import Chart, Series
from igpt_jax.report.runs import Row, Run, known_keys, sweeps, whole

LABEL_KEYS = 3  # most keys in a legend
# Of each job: the metrics in the table.
RESULTS = {"pretrain": ("steps", "train/nats_per_pixel", "eval/nats_per_pixel", "eval/bits_per_dim"),
           "finetune": ("steps", "eval/accuracy", "test_accuracy"),
           "probe": ("best_layer", "test_accuracy", "raw_pixel_accuracy", "untrained_accuracy")}


class Comparison(NamedTuple):
    """Runs that can be compared.

    Attributes:
      title: what they are.
      sentence: what came out; empty: nothing to say.
      charts: the curves of all runs on the same axes.
      keys: the config keys that differ, with their meaning.
      results: names of the metrics in the table.
      rows: of each run: the run, its values of `keys`, its `results`.
    """
    title: str
    sentence: str
    charts: list[Chart]
    keys: Mapping[str, str]
    results: Sequence[str]
    rows: list[tuple[Run, list[Any], list[Any]]]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """One for each set of two or more runs with the same job, objective, data and sweep."""
    swept = sweeps(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.job in RESULTS:
            sweep = run.folder.parent if run.folder.parent in swept else None
            groups.setdefault((run.job, run.values.get("objective"), run.data, sweep), []).append(run)
    found = [whole(members[0], "comparison with others", None, _compared, members, swept.get(sweep), sweep)
             for (*_, sweep), members in groups.items() if len(members) > 1]
    return [each for each in found if each]


def _compared(runs: list[Run], sweep: Row | None, folder: storage.Path | None) -> Comparison:
    keys = differing(runs)
    labels = dict(zip((run.title for run in runs), legend(runs, list(keys)), strict=True))
    results = [name for name in RESULTS[runs[0].job] if any(run.metrics.get(name) is not None for run in runs)]
    drawn = _curves(runs, labels)
    sentence = ""
    if sweep:
        drawn.insert(0, _over_rates(sweep.get("rows", [])))
        sentence = str(sweep.get("verdict", ""))
    rows = [(run, [run.values.get(name, known_keys(run.job)[name][0]) for name in keys],
             [run.metrics.get(name) for name in results]) for run in runs]
    title = f"Learning-rate sweep in {folder.name}/" if folder else f"{runs[0].job} runs compared"
    return Comparison(title, sentence, drawn, keys, results, rows)


def _curves(runs: Sequence[Run], labels: Mapping[str, str]) -> list[Chart]:
    if runs[0].job == "probe":
        return [charts.accuracy_by_layer([(labels[run.title], labels[run.title], run.by_layer) for run in runs], {})]
    metric, scale, *words = (("eval/accuracy", 100, "held-out accuracy", "accuracy, %", ".1f")
                             if runs[0].job == "finetune" else
                             ("eval/nats_per_pixel", 1, "held-out loss", "nats per pixel"))
    return [charts.over_steps({labels[run.title]: charts.points_of(run.lines, "step", metric, scale) for run in runs},
                              *words)]


def _over_rates(rows: Sequence[Row]) -> Chart:
    """Held-out loss at the end over the learning rate."""
    points = sorted(charts.points_of(rows, "learning_rate", "eval/nats_per_pixel"))
    return Chart("held-out loss over learning rate", "learning rate", "nats per pixel", [Series("", points)],
                 log_x=10, value=".4f")


def differing(runs: Sequence[Run]) -> dict[str, str]:
    """{dotted name: meaning} of the keys that two or more runs of one job set differently."""
    return {name: meaning for name, (default, meaning) in known_keys(runs[0].job).items()
            if len({json.dumps(run.values.get(name, default)) for run in runs}) > 1}


def legend(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """A label for each run: what differs in its config, or its title if that does not tell it from the others.

    Keys that any resumed run may change, such as how often it saves, are not in labels, nor are values that follow from
    other keys, such as the sizes of a named model.
    """
    job = runs[0].job
    free = {name for name, rule in key_attributes(job, "resume").items() if rule == "free"}
    chosen = [name for name in names if name not in free and any(_is_given(run, name) for run in runs)]
    short = [name.removesuffix(".name").rpartition(".")[2] for name in chosen]
    labels = [", ".join(f"{last if short.count(last) == 1 else name}={run.values.get(name, known_keys(job)[name][0])}"
                        for name, last in zip(chosen, short, strict=True)) for run in runs]
    told = len(set(labels)) == len(runs) and 0 < len(chosen) <= LABEL_KEYS
    return labels if told else [run.title for run in runs]


def _is_given(run: Run, name: str) -> bool:
    """Whether a key's value does not follow from the others: left at its default, the key would have another value."""
    values: dict[str, Any] = {}
    for key, value in {**run.values, name: known_keys(run.job)[name][0]}.items():
        *path, last = key.split(".")
        group = values
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    try:
        return flat(to_dict(parse(run.job, values)))[name] != run.values.get(name)
    except UserError:  # other keys need it
        return True
