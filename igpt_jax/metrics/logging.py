"""A run's log: lines on stderr, the progress bar and metrics.jsonl."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
from tqdm import tqdm

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.metrics.phases import PhaseTimer, goodput
from igpt_jax.storage import side_files

# What the progress bar and the log lines show, in this order: metric, label, format.
SHOWN = (
    ("train/nats_per_pixel", "loss", ".4f"),
    ("train/bits_per_dim", "bits/dim", ".3f"),
    ("eval/nats_per_pixel", "held-out", ".4f"),
    ("eval/bits_per_dim", "held-out bits/dim", ".3f"),
    ("eval/ema_nats_per_pixel", "held-out, EMA", ".4f"),
    ("train/accuracy", "accuracy", ".1%"),
    ("eval/accuracy", "held-out accuracy", ".2%"),
    ("images_per_second", "images/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
)


def say(line: str) -> None:
    """Prints a line to stderr, above the progress bar if there is one. A line that cannot be printed is dropped."""
    # Neither of two errors may keep a run from saving. Ctrl-C also ends a `| tee`, so the pipe may be broken. And a
    # signal may arrive while a line is written: Python then refuses the line of the signal's handler as reentrant.
    with contextlib.suppress(OSError, RuntimeError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


# Metrics.

class Writer(Protocol):
    """Takes the values of each step that is logged."""

    def write(self, step: int, unix_time: float, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes a run's metrics: metrics.jsonl, the given writers, and a progress bar or log lines. Process 0 only.

    `step` counts finished optimizer steps: the line of step s describes the model after s updates. A run that resumes
    from step s drops the later lines that the interrupted run wrote, so each step has one line. Files in a bucket only
    grow, so these lines stay there, and `load_metrics` skips them. The first line after a restart has `resumed_from`,
    the seconds of the dropped lines (`seconds/lost`) and the seconds without a process (`seconds/down`).

    Args:
      workdir: the job's folder.
      total_steps: the step at which the run will end.
      start_step: finished steps that the run resumes from; 0 for a new run.
      timer: its seconds go into each line.
      writers: also receive `values` (`metrics.writers`). They must not raise.
    """

    def __init__(self, workdir: str, total_steps: int, start_step: int = 0, timer: PhaseTimer | None = None,
                 writers: Sequence[Writer] = ()):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._total_steps, self._start_step, self._started = total_steps, start_step, time.time()
        self._timer, self._reported = timer, ""
        path = storage.path(workdir) / "metrics.jsonl"
        self._resumed = self._resume(path, start_step)
        self._lines = storage.LineWriter(path)
        self._writers = writers
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1,
                         miniters=1, disable=not sys.stderr.isatty())
        self._latest: dict[str, float] = {}

    def _resume(self, path: storage.Path, start_step: int) -> dict[str, float]:
        """Drops the lines of steps that will be repeated. Returns the fields that the next line has about them."""
        if path.is_dir():
            side_files.set_aside(path)
        try:
            lines = [_parse_line(line) for line in storage.read_lines(path)]
        except UserError:  # a new run
            return {}
        valid = _valid(lines)
        kept = [line for line in valid if line["step"] <= start_step]
        if storage.is_local(path) and len(kept) < len(lines):
            if None in lines[:-1]:  # a killed run may leave half a last line, which is no damage
                side_files.set_aside(path, then=f"its other lines are kept ({lines[:-1].count(None)} are damaged)")
            storage.publish(path, "".join(json.dumps(line) + "\n" for line in kept))
        spent = goodput([line for line in valid if line["step"] > start_step])
        spent.pop("goodput", None)
        began = time.time() - (self._timer.unread if self._timer else 0.0)
        down = spent.pop("seconds/down", 0.0) + began - max((line.get("time") or 0 for line in valid), default=began)
        return {"resumed_from": start_step, "seconds/lost": sum(spent.values()), "seconds/down": max(0.0, down)}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of a step. NaN and infinities are null in metrics.jsonl, since JSON cannot spell them."""
        if not self._active:
            return
        now = time.time()
        values = {name: float(value) for name, value in values.items()}
        line = {**values, **self._resumed, **(self._timer.read() if self._timer else {})}
        self._resumed = {}
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._lines.write(json.dumps({"step": step, "time": round(now, 3), **finite}, allow_nan=False))
        self._report_problem()
        for writer in self._writers:
            writer.write(step, now, values)
        self._latest.update(values)
        if self._bar.disable:
            if values:
                say(self._line(step, now, values))
        else:
            if any(name.startswith("eval/") for name in values):
                say(self._line(step, now, values))  # stays above the bar
            self._bar.n = step
            self._bar.set_postfix_str(_describe(self._latest))

    def progress(self, step: int) -> None:
        """Moves the progress bar to `step`, at most once a second."""
        if self._active:
            self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Writes the lines to the disk itself, so that they survive a power loss as the next checkpoint does."""
        if self._active:
            self._lines.flush()

    def close(self) -> None:
        """Ends the progress bar, writes buffered lines and closes the writers."""
        if self._active:
            self._bar.close()
            self._lines.close()
            self._report_problem()
            for writer in self._writers:
                writer.close()

    def _report_problem(self) -> None:
        """Says once that lines cannot be written."""
        problem = str(self._lines.error or "")
        if problem and problem != self._reported:
            say(f"Metrics lines cannot be written and wait in memory: {problem}. Training continues.")
        self._reported = problem

    def _line(self, step: int, now: float, values: Mapping[str, float]) -> str:
        line = f"step {step:,}/{self._total_steps:,}  {_describe(values)}"
        done, left = step - self._start_step, self._total_steps - step
        if done > 0 and left > 0:
            line += f"  ETA {tqdm.format_interval((now - self._started) * left / done)}"
        return line


def _describe(values: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {values[name]:{form}}" for name, label, form in SHOWN if name in values)


def _parse_line(line: str) -> dict[str, float | None] | None:
    """The values of a line; None if it is damaged, or cut because its run was killed."""
    try:
        values = storage.parse_json(line)
    except ValueError:
        return None
    good = (isinstance(values, dict) and "\ufffd" not in line  # bytes that are not UTF-8
            and all(value is None or isinstance(value, int | float) for value in values.values())
            and all(isinstance(values[name], int) for name in ("step", "resumed_from") if name in values))
    return values if good and "step" in values else None


def _valid(lines: Sequence[dict[str, float | None] | None]) -> list[dict[str, float | None]]:
    """The undamaged lines that no restart undid. A line with `resumed_from` undoes the earlier lines of later steps."""
    valid: list[dict[str, float | None]] = []
    for line in filter(None, lines):
        if "resumed_from" in line:
            valid = [earlier for earlier in valid if earlier["step"] <= line["resumed_from"]]
        valid.append(line)
    return valid


def metrics_lines(workdir: str) -> list[dict[str, float | None]]:
    """The lines of a run as they were written, without those that a restart undid; for `goodput`.

    Raises:
      UserError: the workdir has no metrics.
    """
    return _valid([_parse_line(line) for line in storage.read_lines(storage.path(workdir) / "metrics.jsonl")])


def load_metrics(workdir: str) -> list[dict[str, float | None]]:
    """The metrics of a run: one dict per step, in order. Of values logged twice for a step, the last one counts.

    Raises:
      UserError: the workdir has no metrics.
    """
    by_step: dict[int, dict[str, float | None]] = {}
    for line in metrics_lines(workdir):
        by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]
