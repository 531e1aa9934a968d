"""What the workdirs of jobs hold, read for the report; nothing in them is trusted to be whole."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from igpt_jax import storage
from igpt_jax.config import JOBS, UserError, flat, keys
from igpt_jax.metrics import phases as telemetry
from igpt_jax.metrics.logging import load_metrics, metrics_lines

Row = Mapping[str, Any]

# The files whose rows become tables, and of each job the pictures that are drawn anew as charts.
TABLES = ("probe.json", "evaluation.json", "verify.json", "sweep.json")
CHARTED = {"pretrain": {"loss.png"}, "finetune": {"loss.png"}, "probe": {"accuracy_by_layer.png"}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir.

    Attributes:
      path: as it was typed.
      job: its job.
      changed: (key, value, meaning) of what the config sets otherwise than by default.
      result: result.json; empty while the job has not ended.
      lines: its metrics, one dict per step; empty for jobs that do not train.
      goodput: seconds by phase; see `telemetry.goodput`.
      tables: rows by file name.
      manifest: of a pixel store.
      pictures: the PNG files of figures/.
    """
    path: str
    job: str
    changed: list[tuple[str, Any, str]]
    result: Mapping[str, Any]
    lines: list[Row]
    goodput: Mapping[str, float]
    tables: Mapping[str, list[Row]]
    manifest: Mapping[str, Any]
    pictures: list[storage.Path]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Of result.json."""
        metrics = self.result.get("metrics")
        return metrics if isinstance(metrics, Mapping) else {}

    @property
    def name(self) -> str:
        """The last part of the path."""
        return storage.path(self.path).name or self.path

    @property
    def by_layer(self) -> list[Row]:
        """The rows of probe.json that tell of one layer of the trained model each, with an interval."""
        return [row for row in self.tables.get("probe.json", ()) if isinstance(row, Mapping) and row.get("interval")
                and "test_accuracy" in row and row.get("features") == f"layer {row.get('layer')}"]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        pairs = [(line["step"], line[name]) for line in self.lines
                 if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
        return [step for step, _ in pairs], [value for _, value in pairs]


def load(typed: str) -> list[Run]:
    """The runs that a comma list of workdirs and globs names, in the order of the jobs.

    Raises:
      UserError: it names no workdir of a job.
    """
    found = {}
    for pattern in storage.patterns(typed):
        for folder in storage.matching(pattern):
            if (folder / "config.json").exists():
                found[str(folder)] = _load(folder)
    if not found:
        raise UserError(f"workdirs={typed!r} names no workdir of a job. "
                        "Set --config.workdirs to folders that jobs have written, as in 'runs/*'.")
    order = list(JOBS)
    return sorted(found.values(), key=lambda run: (order.index(run.job) if run.job in order else len(order), run.path))


def _load(folder: storage.Path) -> Run:
    config = _json(folder / "config.json", {})
    job = str(config.get("job", ""))
    try:
        lines, seconds = load_metrics(str(folder)), telemetry.goodput(metrics_lines(str(folder)))
    except UserError:
        lines, seconds = [], {}
    tables = {name: rows for name in TABLES if (rows := _json(folder / name, []))}
    return Run(path=str(folder), job=job, changed=_changed(job, config), result=_json(folder / "result.json", {}),
               lines=lines, goodput=seconds, tables=tables, manifest=_json(folder / "manifest.json", {}),
               pictures=[file for file in sorted((folder / "figures").glob("*.png"))
                         if file.name not in CHARTED.get(job, ())])


def _json(file: storage.Path, missing: Any) -> Any:
    """The content of a JSON file; `missing` where it is not there, half-written, or of another kind."""
    try:
        value = json.loads(storage.read(file)) if file.exists() else missing
    except (UserError, ValueError):
        return missing
    return value if isinstance(value, type(missing)) else missing


def _changed(job: str, config: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    if job not in JOBS:
        return []
    values = flat(config)
    return [(name, values[name], meaning) for name, default, meaning in keys(job)
            if name != "job" and name in values and json.dumps(values[name]) != json.dumps(default)]
