"""What a run tells about itself: metrics lines, progress and throughput."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
from tqdm import tqdm

from igpt_jax import side_files, storage
from igpt_jax.config import UserError

# What the progress bar and the log lines show, in this order: metric, label, format.
SHOWN = (
    ("train/nats_per_pixel", "loss", ".4f"),
    ("eval/nats_per_pixel", "held-out", ".4f"),
    ("train/accuracy", "accuracy", ".1%"),
    ("eval/accuracy", "held-out accuracy", ".2%"),
    ("images_per_second", "images/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
)


def say(line: str) -> None:
    """Prints a line to stderr, above the progress bar where there is one; says nothing where that cannot be."""
    # Ctrl-C also ends a `| tee`: nobody may be listening, and the run must save. So it must where a signal came amid
    # another line: its handler's is then refused ("reentrant call"), which must not end the run.
    with contextlib.suppress(OSError, RuntimeError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


# Speed.

def train_flops_per_image(layers: int, embed: int, mlp: int, palette_size: int, tokens: int, causal: bool = True
                          ) -> float:
    """Model FLOPs of one image in training, forward and backward, with the causal half of attention.

        forward = 2 x matrix parameters x tokens + 2 x layers x tokens^2 x embed
        train   = 3 x forward

    Matrix parameters: 4 embed^2 + 2 embed x mlp per layer, and the head's palette_size x embed. The second term is
    half of the 4 x layers x tokens^2 x embed of q k^T and of the weighted sum of v: the causal mask needs only that
    half, whatever the kernel computes. The backward pass costs twice the forward. Embedding look-ups, norms and
    anything that the backward pass recomputes count as nothing (PaLM, arXiv 2204.02311, Appendix B, with causal half).
    Where attention is not causal, all of it counts.
    """
    matrices = layers * (4 * embed**2 + 2 * embed * mlp) + palette_size * embed
    forward = 2 * matrices * tokens + (2 if causal else 4) * layers * tokens**2 * embed
    return 3 * forward


def mfu(flops_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: model FLOP/s per device (causal half) over the chip's peak dense bf16 FLOP/s."""
    return flops_per_second / peak_flops


class Throughput:
    """Speed of training, without compilation, evaluation and checkpoints.

    The first `step` starts the clock, since that step compiles. What runs inside `paused()` does not count; let the
    pending steps finish before it (read their metrics), or they run on time that is not counted.

    Args:
      batch_size: images per step over all devices.
      tokens: tokens per image.
      flops_per_image: `train_flops_per_image`.
      devices: number of devices over all processes.
      peak_flops: of one device; None leaves MFU out.
      clock: seconds.
    """

    def __init__(self, batch_size: int, tokens: int, flops_per_image: float, devices: int,
                 peak_flops: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self._batch_size, self._tokens = batch_size, tokens
        self._flops_per_image, self._devices, self._peak_flops = flops_per_image, devices, peak_flops
        self._clock = clock
        self._since: float | None = None
        self._steps = 0
        self._earlier_steps, self._earlier_seconds = 0, 0.0

    def step(self) -> None:
        """Counts one finished step."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside: `with throughput.paused(): evaluate(...)`."""
        start = self._clock()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += self._clock() - start

    def read(self) -> dict[str, float]:
        """Rates since the last `read`; empty before two steps are done."""
        if not self._steps:
            return {}
        now = self._clock()
        steps, seconds = self._steps, now - self._since
        self._since, self._steps = now, 0
        self._earlier_steps += steps
        self._earlier_seconds += seconds
        return self._rates(steps, seconds)

    def overall(self) -> dict[str, float]:
        """Rates of the whole run up to the last `read`; empty where nothing was measured."""
        return self._rates(self._earlier_steps, self._earlier_seconds) if self._earlier_steps else {}

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        images = steps * self._batch_size / max(seconds, 1e-9)
        flops = images * self._flops_per_image / self._devices
        rates = {"images_per_second": images, "tokens_per_second": images * self._tokens,
                 "model_tflops_per_second_per_device": flops / 1e12}
        if self._peak_flops:
            rates["mfu"] = mfu(flops, self._peak_flops)
        return rates


# Where the time goes.

PHASES = ("start", "compile", "input", "step", "save", "evaluate")


class Ledger:
    """Adds up the seconds of a run by phase: `with ledger("save"): ...`. What is in no other phase is `step`.

    Args:
      phase: the one that begins now.
      clock: seconds.
    """

    def __init__(self, phase: str = "start", clock: Callable[[], float] = time.monotonic):
        self._phase, self._clock, self._since = phase, clock, clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> str:
        """Goes over to another phase; returns the former one."""
        now, former = self._clock(), self._phase
        self._seconds[former] += now - self._since
        self._phase, self._since = phase, now
        return former

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        former = self.enter(phase)
        try:
            yield
        finally:
            self.enter(former)

    def read(self) -> dict[str, float]:
        """{"seconds/save": ...} of the phases that took time since the last `read`."""
        self.enter(self._phase)
        spent = {f"seconds/{phase}": round(seconds, 4) for phase, seconds in self._seconds.items() if seconds > 0}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return spent

    @property
    def unread(self) -> float:
        """Seconds since the last `read`."""
        return sum(self._seconds.values()) + self._clock() - self._since


def goodput(lines: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Where the wall time of a run went, over all its restarts, from its metrics lines alone. Seconds.

    Returns:
      `seconds/PHASE` of each phase; `seconds/lost`: work that a crash undid; `seconds/down`: between the last line
      that a process wrote and the start of the next one; `goodput`: the share of steps that counted in all of it.
    """
    total: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("seconds/") and value is not None:
                total[name] = total.get(name, 0.0) + value
    wall = sum(total.values())
    return {**total, "goodput": total.get("seconds/step", 0.0) / wall} if wall else {}


# Metrics.

class Writer(Protocol):
    """Takes the values of each step that is logged."""

    def write(self, step: int, unix_time: float, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes a run's metrics: metrics.jsonl, the given writers, and a progress bar or log lines. Process 0 only.

    `step` counts finished optimizer steps: the line of step s tells about the model after s updates. A run that goes
    on after step s drops the lines after s that an interrupted run has left, and so writes each of them once. In a
    bucket, where lines cannot be taken back, they stay and `load_metrics` passes them over. The first line of such a
    run says `resumed_from`, the seconds of the dropped lines as `seconds/lost`, and how long no process ran.

    Args:
      workdir: the job's folder.
      total_steps: where the run will end.
      start_step: finished steps that the run goes on from; 0 for a new run.
      ledger: its seconds go into each line.
      writers: where `values` go besides (metric_writers.py); they must not raise.
    """

    def __init__(self, workdir: str, total_steps: int, start_step: int = 0, ledger: Ledger | None = None,
                 writers: Sequence[Writer] = ()):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._total_steps, self._start_step, self._started = total_steps, start_step, time.time()
        self._ledger, self._told = ledger, ""
        path = storage.path(workdir) / "metrics.jsonl"
        self._resumed = self._resume(path, start_step)
        self._lines = storage.LineWriter(path)
        self._writers = writers
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True,
                         disable=not sys.stderr.isatty())
        self._latest: dict[str, float] = {}

    def _resume(self, path: storage.epath.Path, start_step: int) -> dict[str, float]:
        """Drops the lines of steps that will be done again; returns what the next line says of them."""
        try:
            lines = [_parse_line(line) for line in storage.read_lines(path)]
        except UserError:  # a new run
            return {}
        valid = _valid(lines)
        kept = [line for line in valid if line["step"] <= start_step]
        if storage.is_local(path) and len(kept) < len(lines):
            if None in lines[:-1]:  # the last is torn where a run was killed
                side_files.set_aside(path, f"its other lines are kept ({lines[:-1].count(None)} are damaged)")
            storage.publish(path, "".join(json.dumps(line) + "\n" for line in kept))
        spent = goodput([line for line in valid if line["step"] > start_step])
        spent.pop("goodput", None)
        began = time.time() - (self._ledger.unread if self._ledger else 0.0)
        down = spent.pop("seconds/down", 0.0) + began - max((line.get("time") or 0 for line in valid), default=began)
        return {"resumed_from": start_step, "seconds/lost": sum(spent.values()), "seconds/down": max(0.0, down)}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of a step. In metrics.jsonl NaN and infinities are null, as JSON has no word for them."""
        if not self._active:
            return
        now = time.time()
        values = {name: float(value) for name, value in values.items()}
        told = {**values, **self._resumed, **(self._ledger.read() if self._ledger else {})}
        self._resumed = {}
        finite = {name: value if math.isfinite(value) else None for name, value in told.items()}
        self._lines.write(json.dumps({"step": step, "time": round(now, 3), **finite}, allow_nan=False))
        self._tell_problem()
        for writer in self._writers:
            writer.write(step, now, values)
        self._latest.update(values)
        if self._bar.disable:
            if values:
                say(self._line(step, now, values))
        else:
            self._bar.set_postfix_str(_describe(self._latest), refresh=False)
            self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Makes sure that the lines outlast a loss of power, as the checkpoint will that is saved next."""
        if self._active:
            self._lines.flush()

    def close(self) -> None:
        """Ends the bar and writes out what is buffered."""
        if self._active:
            self._bar.close()
            self._lines.close()
            self._tell_problem()
            for writer in self._writers:
                writer.close()

    def _tell_problem(self) -> None:
        problem = str(self._lines.error or "")
        if problem and problem != self._told:
            say(f"Metrics lines cannot be written and wait in memory: {problem}. Training goes on.")
        self._told = problem

    def _line(self, step: int, now: float, values: Mapping[str, float]) -> str:
        line = f"step {step:,}/{self._total_steps:,}  {_describe(values)}"
        done, left = step - self._start_step, self._total_steps - step
        if done > 0 and left > 0:
            line += f"  ETA {tqdm.format_interval((now - self._started) * left / done)}"
        return line


def _describe(values: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {values[name]:{form}}" for name, label, form in SHOWN if name in values)


def _parse_line(line: str) -> dict[str, float | None] | None:
    """The values of a line; None where it is damaged, or torn since its run was killed."""
    try:
        values = storage.parse_json(line)
    except ValueError:
        return None
    good = (isinstance(values, dict) and "\ufffd" not in line  # which stands for bytes that are not UTF-8
            and all(value is None or isinstance(value, int | float) for value in values.values())
            and all(isinstance(values[name], int) for name in ("step", "resumed_from") if name in values))
    return values if good and "step" in values else None


def _valid(lines: Sequence[dict[str, float | None] | None]) -> list[dict[str, float | None]]:
    """The whole lines of which no later run says, by going on from an earlier step, that they were undone."""
    valid: list[dict[str, float | None]] = []
    for line in filter(None, lines):
        if "resumed_from" in line:
            valid = [earlier for earlier in valid if earlier["step"] <= line["resumed_from"]]
        valid.append(line)
    return valid


def metrics_lines(workdir: str) -> list[dict[str, float | None]]:
    """The lines of a run as they were written, but for those that a later run undid; for `goodput`.

    Raises:
      UserError: the workdir has no metrics.
    """
    return _valid([_parse_line(line) for line in storage.read_lines(storage.path(workdir) / "metrics.jsonl")])


def load_metrics(workdir: str) -> list[dict[str, float | None]]:
    """The metrics of a run: one dict per step, in order; what was logged twice for a step counts as logged last.

    Raises:
      UserError: the workdir has no metrics.
    """
    by_step: dict[int, dict[str, float | None]] = {}
    for line in metrics_lines(workdir):
        by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]
