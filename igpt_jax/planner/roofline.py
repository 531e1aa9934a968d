"""From what a step computes and moves to the seconds that it takes.

    busy    = max(FLOPs / peak, memory bytes / bandwidth)
    waited  = bytes sent over tensor and context / bandwidth of their links: the next product needs them
    beside  = bytes sent over data and fsdp / bandwidth of their links: weights and gradients travel meanwhile
    bound   = max(busy + waited, beside)
    seconds = bound / share

The bound takes every unit to run at its peak. `share` says how much of that speed runs reach: a setting until real runs
on the same kind of device give it (`jobs/plan.py`).
"""

import dataclasses
from collections.abc import Mapping

from igpt_jax.parallel import topology
from igpt_jax.parallel.sharding import BATCH_AXES
from igpt_jax.planner.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of one step; all but step_seconds are what a part alone would take at its peak."""
    compute_seconds: float
    memory_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    step_seconds: float
    evidence: Evidence

    @property
    def bound_seconds(self) -> float:
        return max(max(self.compute_seconds, self.memory_seconds) + self.exposed_seconds, self.overlapped_seconds)


def forecast(target: topology.Target, mesh_shape: Mapping[str, int], flops: float, memory_bytes: float,
             collective_bytes: Mapping[str, float], share: float, evidence: Evidence) -> Forecast:
    """The time of a step.

    Args:
      target: with a chip.
      mesh_shape: sizes of the mesh axes.
      flops: of all devices together.
      memory_bytes, collective_bytes: of one device; the latter by mesh axes, joined by +.
      share: of the bound's speed.
      evidence: of the share.
    """
    waited = beside = 0.0
    for axes, sent in collective_bytes.items():
        names = tuple(axes.split("+"))
        seconds = sent / topology.bandwidth(target, mesh_shape, names)
        if set(names) & set(BATCH_AXES):
            beside += seconds
        else:
            waited += seconds
    result = Forecast(flops / target.devices / target.chip.peak_bf16_flops, memory_bytes / target.chip.hbm_bandwidth,
                      waited, beside, 0.0, evidence)
    return dataclasses.replace(result, step_seconds=result.bound_seconds / share)
