"""Reads what the workdirs of jobs hold; nothing in them is trusted to be whole."""

import contextlib
import dataclasses
import functools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from igpt_jax import checkpoint, storage
from igpt_jax.config import JOBS, UserError, flat, keys
from igpt_jax.metrics import charts, phases
from igpt_jax.metrics.logging import load_metrics, metrics_lines, say

Row = Mapping[str, Any]

TABLES = ("probe.json", "evaluation.json", "verify.json", "scaling.json")  # files whose rows become tables
CHARTED = ("loss.png", "accuracy_by_layer.png", "accuracy_over_loss.png")  # the page draws them anew
# Results before data, and data before checks of it.
ORDER = ("pretrain", "probe", "finetune", "evaluate", "sample", "prepare", "plan", "convert", "verify")
# Keys that decide, with the store, what a job measures on: losses compare only on the same tokens.
MEASURED_ON = {"pretrain": ("data.held_out", "codec", "palette"), "finetune": ("data.test", "data.held_out", "limit"),
               "probe": ("data.test", "data.held_out", "limit")}
DEPTH = 2  # folders between one that is named and a workdir below it


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir.

    Attributes:
      folder: the workdir.
      title: its path below the folder that all workdirs of the page have in common.
      job: its job.
      values: its config, by dotted name.
      result: result.json; empty while the job has not ended.
      lines: its metrics, one dict per step; empty for jobs that do not train.
      goodput: seconds by phase; see `phases.goodput`.
      tables: rows by file name.
      manifest: of a pixel store.
    """
    folder: storage.Path
    title: str
    job: str
    values: Mapping[str, Any]
    result: Row
    lines: Sequence[Row]
    goodput: Mapping[str, float]
    tables: Mapping[str, Sequence[Row]]
    manifest: Row

    @property
    def metrics(self) -> Row:
        """Of result.json."""
        metrics = self.result.get("metrics")
        return metrics if isinstance(metrics, Mapping) else {}

    @functools.cached_property
    def store(self) -> str:
        """Its data.store, or that of its checkpoint's training; the run's own title where neither is known."""
        store, given = self.values.get("data.store"), self.values.get("checkpoint")
        if not store and given:
            store = given
            # It has moved, or its bucket is out of reach: others of the same path compare.
            with contextlib.suppress(UserError, OSError, ImportError):
                store = checkpoint.load_metadata(str(given)).config.data.store
        return str(store or self.title)

    @property
    def data(self) -> tuple[Any, ...]:
        """What the run is measured on. Figures of two runs compare only if it is the same."""
        keys = known_keys(self.job)
        names = MEASURED_ON.get(self.job, ())
        if self.store.startswith("tfds:"):  # a store on disk has one size
            names += ("image_size",)
        return self.store, *(str(self.values.get(name, keys.get(name, [0])[0])) for name in names)

    @property
    def held_out_accuracy(self) -> float | None:
        """The held-out accuracy of a probe's best layer, or of a fine-tuning's best step; None if there is none."""
        rows, place, column = ((self.by_layer, "layer", "held_out_accuracy") if self.job == "probe" else
                               (self.lines, "step", "eval/accuracy"))
        best = self.metrics.get(f"best_{place}")
        return next((row[column] for row in rows if row.get(place) == best and charts.finite(row.get(column))), None)

    @property
    def changed(self) -> list[tuple[str, Any, str]]:
        """(key, value, meaning) of what its config sets otherwise than by default."""
        return [(name, self.values[name], meaning) for name, (default, meaning) in known_keys(self.job).items()
                if name != "job" and name in self.values and json.dumps(self.values[name]) != json.dumps(default)]

    @property
    def by_layer(self) -> list[Row]:
        """The rows of probe.json that tell of one layer of the trained model each, with an interval."""
        return [row for row in self.tables.get("probe.json", ()) if row.get("interval") and "test_accuracy" in row
                and row.get("features") == f"layer {row.get('layer')}"]

    @property
    def pictures(self) -> list[storage.Path]:
        """The PNG files in figures/ that no chart of the page replaces."""
        return [file for file in sorted((self.folder / "figures").glob("*.png")) if file.name not in CHARTED]


@functools.cache
def known_keys(job: str) -> Mapping[str, tuple[Any, str]]:
    """(default, meaning) of each key of a job."""
    return {name: (default, meaning) for name, default, meaning in keys(job)} if job in JOBS else {}


def load(typed: str) -> list[Run]:
    """The runs that a comma list of workdirs and globs names, in the order of a page. Reports are left out.

    Where a folder that is named is not a workdir, those in it are taken, such as the runs of a sweep.

    Raises:
      UserError: it names no workdir of a job.
    """
    named = [folder for pattern in storage.patterns(typed) for folder in storage.matching(pattern)]
    found = {str(folder): folder for start in named for folder in _workdirs(start, DEPTH)}
    configs = {folder: _json(folder / "config.json", {}) for folder in found.values()}
    configs = {folder: config for folder, config in configs.items() if config.get("job") != "report"}
    if not configs:
        raise UserError(f"workdirs={typed!r} names no workdir of a job. "
                        "Set --config.workdirs to folders that jobs have written, as in 'runs/*'.")
    titles = _titles(list(configs))
    runs = [_load(folder, config, titles[folder]) for folder, config in configs.items()]
    return sorted(runs, key=lambda run: (ORDER.index(run.job) if run.job in ORDER else len(ORDER), run.title))


def _workdirs(folder: storage.Path, depth: int) -> Iterator[storage.Path]:
    if (folder / "config.json").exists():
        yield folder
    elif depth:
        with contextlib.suppress(UserError):  # a file, or a folder that cannot be read
            for child in storage.children(folder):
                yield from _workdirs(child, depth - 1)


def _titles(folders: Sequence[storage.Path]) -> dict[storage.Path, str]:
    """The paths below the last folder that they have in common."""
    parts = [folder.parts for folder in folders]
    common = next((depth for depth in range(min(map(len, parts))) if len({each[:depth + 1] for each in parts}) > 1
                   or any(len(each) == depth + 1 for each in parts)), 0)
    return {folder: "/".join(folder.parts[common:]) for folder in folders}


def _load(folder: storage.Path, config: Row, title: str) -> Run:
    try:
        lines, seconds = load_metrics(str(folder)), phases.goodput(metrics_lines(str(folder)))
    except UserError:
        lines, seconds = [], {}
    tables = {name: rows for name in TABLES
              if (rows := [row for row in _json(folder / name, []) if isinstance(row, Mapping)])}
    return Run(folder, title, str(config.get("job", "")), flat(config), _json(folder / "result.json", {}), lines,
               seconds, tables, _json(folder / "manifest.json", {}))


def _json(file: storage.Path, missing: Any) -> Any:
    """The content of a JSON file; `missing` where it is not there, half-written, or of another kind."""
    try:
        value = storage.parse_json(storage.read(file)) if file.exists() else missing
    except (UserError, ValueError):
        return missing
    return value if isinstance(value, type(missing)) else missing


def most_accurate(runs: Sequence[Run], job: str) -> list[Run]:
    """Of each data set, the run of a job with the best held-out accuracy; if none has one, the best test accuracy."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.job == job and charts.finite(run.metrics.get("test_accuracy")):
            groups.setdefault(run.data, []).append(run)

    def accuracy(run: Run) -> tuple[bool, float]:
        held_out = run.held_out_accuracy
        return held_out is not None, run.metrics["test_accuracy"] if held_out is None else held_out

    return [max(same, key=accuracy) for same in groups.values()]


def sweeps(runs: Sequence[Run]) -> dict[storage.Path, Row]:
    """The sweep.json beside the workdirs of a sweep, by folder."""
    parents = dict.fromkeys(run.folder.parent for run in runs)
    return {folder: sweep for folder in parents if (sweep := _json(folder / "sweep.json", {}))}


def whole(run: Run, what: str, otherwise: Any, make: Callable, *arguments: Any) -> Any:
    """`make(*arguments)`, which reads a run's files; `otherwise`, and a line, if they are not what a job writes."""
    try:
        return make(*arguments)
    except (UserError, LookupError, TypeError, ValueError, AttributeError, OverflowError, EOFError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:
        say(f"{run.folder}: its {what} is left out, because a file is damaged: {' '.join(str(error).split())}")
        return otherwise
