"""Predicts the time of a step from its FLOPs and bytes, at the speed that public runs reached.

    compute    = FLOPs / peak (on TPUs with `Estimate.busy_flops`)
    memory     = memory bytes / bandwidth
    exposed    = bytes sent over tensor and context / bandwidth of their links: the next product needs the result
    overlapped = bytes sent over data and fsdp / bandwidth of their links: sent while other layers compute
    seconds    = a compute + b memory + exposed + c overlapped

`benchmarks/roofline.py` fits a, b and c to steps that others measured. Width and tokens per chip enter through memory:
a narrow model moves more bytes per FLOP. Runs of the user's own replace the fit's scale (`jobs/plan.py`).
"""

import dataclasses
from collections.abc import Mapping

from igpt_jax.parallel import topology
from igpt_jax.parallel.sharding import BATCH_AXES
from igpt_jax.planner.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of one step.

    Each of `compute_seconds`, `memory_seconds`, `exposed_seconds` and `overlapped_seconds` is the time of one part
    alone, at peak speed. `step_seconds` is the prediction, from `low_seconds` to `high_seconds`.
    """
    compute_seconds: float
    memory_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    step_seconds: float = 0.0
    low_seconds: float = 0.0
    high_seconds: float = 0.0
    evidence: Evidence = Evidence.UNCALIBRATED

    @property
    def bound_seconds(self) -> float:
        """The step if every unit ran at its peak, and all that can overlap did."""
        return max(max(self.compute_seconds, self.memory_seconds) + self.exposed_seconds, self.overlapped_seconds)


@dataclasses.dataclass(frozen=True)
class Speed:
    """How the seconds of a real step follow from its parts at peak.

    Attributes:
      compute, memory, overlapped: a, b and c above.
      low, high: real seconds over predicted ones: 80 % of the measurements, each predicted without itself, lie between.
      scale: of all seconds, from runs of the user's own.
      share: of the bound's speed, in place of the fit; 0: the fit.
    """
    compute: float
    memory: float
    overlapped: float
    low: float = 1.0
    high: float = 1.0
    scale: float = 1.0
    share: float = 0.0
    evidence: Evidence = Evidence.UNCALIBRATED

    def seconds(self, parts: Forecast) -> float:
        """The seconds of a step."""
        if self.share:
            return parts.bound_seconds / self.share
        return self.scale * (self.compute * parts.compute_seconds + self.memory * parts.memory_seconds
                             + parts.exposed_seconds + self.overlapped * parts.overlapped_seconds)


# The result of benchmarks/roofline.py, in docs/roofline.json.
PUBLIC = Speed(compute=1.669, memory=0.773, overlapped=0.476, low=0.8, high=1.38)


def flat(share: float) -> Speed:
    """A fixed share of the bound's speed."""
    return dataclasses.replace(PUBLIC, share=share, low=1.0, high=1.0)


def forecast(target: topology.Target, mesh_shape: Mapping[str, int], flops: float, memory_bytes: float,
             collective_bytes: Mapping[str, float], speed: Speed = PUBLIC) -> Forecast:
    """Predicts the time of one step.

    Args:
      target: the devices; they must have a known chip.
      mesh_shape: sizes of the mesh axes.
      flops: of all devices together.
      memory_bytes: read and written by one device.
      collective_bytes: sent by one device, by mesh axes joined with +.
    """
    exposed = overlapped = 0.0
    for axes, sent in collective_bytes.items():
        names = tuple(axes.split("+"))
        seconds = sent / topology.bandwidth(target, mesh_shape, names)
        # Gathers of weights and sums of gradients depend on no activation of the layer at hand, so that a compiler can
        # run them during its products. What tensor and context exchange is the input of the very next product.
        if set(names) & set(BATCH_AXES):
            overlapped += seconds
        else:
            exposed += seconds
    parts = Forecast(flops / target.devices / target.chip.peak_bf16_flops, memory_bytes / target.chip.hbm_bandwidth,
                     exposed, overlapped, evidence=speed.evidence)
    seconds = speed.seconds(parts)
    return dataclasses.replace(parts, step_seconds=seconds, low_seconds=speed.low * seconds,
                               high_seconds=speed.high * seconds)
