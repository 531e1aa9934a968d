"""Predicts the time of a step from its FLOPs and bytes (a roofline).

    busy       = max(FLOPs / peak, memory bytes / bandwidth)
    exposed    = bytes sent over tensor and context / bandwidth of their links: the next product needs the result
    overlapped = bytes sent over data and fsdp / bandwidth of their links: sent while other layers compute
    bound      = max(busy + exposed, overlapped)
    seconds    = bound / share

The bound assumes that every unit runs at its peak. `share` is the fraction of that speed that real runs reach. It is a
setting until runs on the same kind of device replace it (`jobs/plan.py`).
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
    alone, at peak speed. `step_seconds` is the prediction.
    """
    compute_seconds: float
    memory_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    step_seconds: float
    evidence: Evidence

    @property
    def bound_seconds(self) -> float:
        """The step at peak speed."""
        return max(max(self.compute_seconds, self.memory_seconds) + self.exposed_seconds, self.overlapped_seconds)


def forecast(target: topology.Target, mesh_shape: Mapping[str, int], flops: float, memory_bytes: float,
             collective_bytes: Mapping[str, float], share: float, evidence: Evidence) -> Forecast:
    """Predicts the time of one step.

    Args:
      target: the devices; they must have a known chip.
      mesh_shape: sizes of the mesh axes.
      flops: of all devices together.
      memory_bytes: read and written by one device.
      collective_bytes: sent by one device, by mesh axes joined with +.
      share: fraction of the bound's speed that a run reaches.
      evidence: where `share` comes from.
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
    result = Forecast(flops / target.devices / target.chip.peak_bf16_flops, memory_bytes / target.chip.hbm_bandwidth,
                      exposed, overlapped, 0.0, evidence)
    return dataclasses.replace(result, step_seconds=result.bound_seconds / share)
