"""The result of a plan: figures from a verdict, each with its evidence, as JSON and as a table."""

import dataclasses
import math
import os
from typing import Any

from igpt_jax.config import PlanConfig
from igpt_jax.config.keys import compiler_options_text
from igpt_jax.metrics import throughput as telemetry
from igpt_jax.model.dims import Dims, tokens_per_parameter
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.model.objectives import objective_of
from igpt_jax.parallel.topology import GIB, Target
from igpt_jax.planner.compilation import Verdict
from igpt_jax.planner.cost import RunCost, run_cost
from igpt_jax.planner.estimate import WIDTHS, estimate
from igpt_jax.planner.evidence import Evidence
from igpt_jax.planner.roofline import PUBLIC, Forecast, Speed, forecast

EXACT, COMPILER, ESTIMATE = Evidence.EXACT, Evidence.COMPILER, Evidence.ESTIMATE


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `config` costs on `target`. `forecast` is None unless the step compiled; `schedule` and `mfu` also unless
    it is a training step.

    Attributes:
      usable_bytes: memory of one device that a program can use.
      model_flops: FLOPs of one step over all devices, without recomputation and with half of causal attention.
    """
    config: PlanConfig
    target: Target
    verdict: Verdict
    usable_bytes: int
    model_flops: float
    forecast: Forecast | None = None
    schedule: RunCost | None = None  # named so in plan.json

    @property
    def fits(self) -> bool | None:
        """Whether the step fits in memory; None if the compiler failed for another reason."""
        if self.verdict.status == "failed":
            return None
        return self.verdict.status == "compiled" and self.verdict.required_bytes <= self.usable_bytes

    @property
    def attention(self) -> str:
        """The share of attention that counts as model FLOPs."""
        return "causal half" if objective_of(self.config).causal else "all of attention"

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization (see `telemetry.mfu`)."""
        return self._mfu(self.forecast.step_seconds) if self.schedule else None

    @property
    def mfu_interval(self) -> tuple[float, float] | None:
        """The lowest and highest MFU that the prediction allows for."""
        return (self._mfu(self.forecast.high_seconds), self._mfu(self.forecast.low_seconds)) if self.schedule else None

    def _mfu(self, seconds: float) -> float:
        return telemetry.mfu(self.model_flops / self.target.devices / seconds, self.target.chip.peak_bf16_flops)

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """Training speed."""
        tokens = self.config.batch_size * self.config.image_size ** 2 * self.config.channels
        return self.forecast and tokens / self.target.devices / self.forecast.step_seconds

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures for result.json."""
        return {"parameters": self.verdict.parameters, "fits": self.fits,
                "bytes_per_device": self.verdict.required_bytes, "hbm_bytes": self.usable_bytes,
                "step_seconds": self.forecast and self.forecast.step_seconds, "mfu": self.mfu,
                "mfu_interval": self.mfu_interval, "tokens_per_second_per_device": self.tokens_per_second_per_device,
                "compiler_options": self.verdict.compiler_options}

    def to_dict(self) -> dict[str, Any]:
        """All figures, for plan.json; `table` has each figure with its evidence."""
        rows = {name: {"value": value, "evidence": str(evidence)} for name, value, evidence in self.rows()}
        optional = {name: part and dataclasses.asdict(part) for name, part in
                    (("forecast", self.forecast), ("schedule", self.schedule))}
        return {**self.metrics, "model_flops": self.model_flops, **optional, "table": rows,
                "verdict": dataclasses.asdict(self.verdict)}

    def rows(self) -> list[tuple[str, str, Evidence | str]]:
        """The table's rows: name, figure, evidence."""
        v, config = self.verdict, self.config
        mesh = " x ".join(f"{axis}={size}" for axis, size in v.mesh.items() if size > 1) or "one device"
        rows = [("what", f"{config.step} step of {config.model.name}, {v.parameters:,} parameters, {config.image_size}x"
                         f"{config.image_size}, batch {config.batch_size:,}", EXACT),
                ("where", f"{config.topology}, {v.devices:,} x {v.device_kind}, mesh {mesh}", EXACT),
                ("how", f"{v.attention} attention, remat {config.model.remat}, accumulate {config.accumulate}, "
                        f"{config.precision}", EXACT),
                *self._tokens_per_parameter(),
                *(("compiler options" if not index else "", option, EXACT)
                  for index, option in enumerate(compiler_options_text(v.compiler_options).split() or ["none"])),
                ("fits", self._fit(), COMPILER)]
        if v.status != "compiled":
            return rows
        others = v.temporaries_bytes - v.gradients_bytes
        rows += [("  parameters", _gib(v.params_bytes), EXACT), ("  moments", _gib(v.moments_bytes), EXACT),
                 *([("  moving average of parameters", _gib(v.averages_bytes), EXACT)] if v.averages_bytes else []),
                 ("  gradients", _gib(v.gradients_bytes), EXACT),
                 ("  activations and other temporaries", _gib(max(0, others)), COMPILER)]
        if self.model_flops:
            again = v.flops / self.model_flops - 1
            causes = "remat, attention kernels" + (", Muon" if config.optimizer.name == "muon" else "")
            rows += [("model FLOPs per step", f"{self.model_flops:.4g} ({self.attention})", EXACT),
                     ("executed FLOPs per step", f"{v.flops:.4g} ({again:+.0%}: {causes})", EXACT)]
        rows += [("memory traffic per device and step", _gib(v.memory_bytes), ESTIMATE)]
        rows += [(f"sent per device and step over {axes}", _gib(size), ESTIMATE)
                 for axes, size in sorted(v.collective_bytes.items()) if size >= 2**20]
        rows += self._time_rows()
        if v.unknown_loops:
            rows.append(("note", f"{v.unknown_loops} loops of unknown length, counted as one iteration each", ESTIMATE))
        return rows

    def _tokens_per_parameter(self) -> list[tuple[str, str, Evidence]]:
        v, config = self.verdict, self.config
        if config.step != "train" or not v.parameters:
            return []
        read, advice = tokens_per_parameter(config, config.image_size ** 2 * config.channels, v.parameters)
        far = ", far from the compute-optimal 200 to 400" if advice else ""
        return [("tokens per parameter", f"{read} in {config.steps:,} steps{far}", EXACT)]

    def _fit(self) -> str:
        v = self.verdict
        used, room = v.required_bytes, self.usable_bytes
        if v.status != "compiled" and not used:
            return f"{'unknown' if self.fits is None else 'no'}: {v.message}"
        if self.fits:
            return f"yes: {_gib(used)} of {_gib(room)} per device, {1 - used / room:.0%} free"
        return f"no: {_gib(used)} of {_gib(room)} per device, {_gib(used - room)} too much"

    def _time_rows(self) -> list[tuple[str, str, Evidence]]:
        if not self.forecast:
            return [("step time", f"unknown: public runs are in bfloat16, not {self.config.precision}", ESTIMATE)]
        f, evidence = self.forecast, self.forecast.evidence
        rows = [("at peak", f"compute {f.compute_seconds:.3g} s, memory {f.memory_seconds:.3g} s; network "
                            f"{f.exposed_seconds:.3g} s exposed, {f.overlapped_seconds:.3g} s overlapped", ESTIMATE),
                ("step time", f"{f.step_seconds:.3g} s ({f.low_seconds:.3g} to {f.high_seconds:.3g})", evidence)]
        if self.config.step == "train":
            s, (low, high) = self.schedule, self.mfu_interval
            least, most = (s.days * seconds / f.step_seconds for seconds in (f.low_seconds, f.high_seconds))
            mfu = f"{100 * self.mfu:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            rows += [("MFU", f"{mfu}, {self.attention}", evidence),
                     ("images per second", f"{self.config.batch_size / f.step_seconds:,.1f}, "
                                           f"{self.tokens_per_second_per_device:,.0f} tokens per device", evidence),
                     (f"{self.config.steps:,} steps", f"{s.days:,.2f} days ({least:,.2f} to {most:,.2f}), "
                                              f"{s.device_hours:,.0f} device-hours, ${s.dollars:,.0f}", evidence),
                     ("  in the paper's unit", f"{s.v100_days:,.0f} V100-days", ESTIMATE),
                     ("checkpoint", _gib(s.checkpoint_bytes), EXACT),
                     ("  save", f"{s.save_seconds:,.1f} s; best every {s.save_every_seconds / 60:,.0f} minutes, "
                                f"{s.save_every_seconds / f.step_seconds:,.0f} steps", ESTIMATE)]
        else:
            rows += [("images per second", f"{self.config.batch_size / f.step_seconds:,.1f}", evidence),
                     ("note", "the speed was fitted to training steps", ESTIMATE)]
        return rows


def answer(config: PlanConfig, target: Target, verdict: Verdict, speed: Speed = PUBLIC) -> Answer:
    """Computes every figure of a plan."""
    d = Dims.of(config.model, config.vocabulary, config.image_size, channels=config.channels)
    flops = config.batch_size * train_flops_per_image(d.L, d.D, d.F, d.V, d.T, objective_of(config).causal)
    flops = flops if config.step == "train" else 0.0
    usable = target.chip.usable_bytes
    if target.platform == "cpu":  # CPU devices share the machine's memory
        usable = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // target.devices
    plain = Answer(config, target, verdict, usable, flops)
    if verdict.status != "compiled":
        return plain
    fitted = speed.evidence == Evidence.UNCALIBRATED and not speed.share
    if target.platform != "cpu" and config.precision in WIDTHS and fitted:
        return plain  # public runs say nothing of other precisions
    train = config.step == "train"
    busy = estimate(config).busy_flops(config, target.chip, verdict.flops) if train else verdict.flops
    time = forecast(target, verdict.mesh, busy, verdict.memory_bytes, verdict.collective_bytes, speed)
    cost = run_cost(config, target, time.step_seconds, flops, verdict.checkpoint_bytes) if flops else None
    return dataclasses.replace(plain, forecast=time, schedule=cost)


def table(rows: list[tuple[str, str, Any]]) -> str:
    """Formats rows as aligned text."""
    widths = [max(len(str(row[column])) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {evidence}".rstrip() for name, value, evidence in rows)


def _gib(size: float) -> str:
    digits = 2 if size == 0 or abs(size) >= GIB / 10 else 2 - math.floor(math.log10(abs(size) / GIB))
    return f"{size / GIB:,.{digits}f} GiB"
