"""Time and cost of a whole run, and how often to save."""

import dataclasses
import math

from igpt_jax.config import PlanConfig
from igpt_jax.parallel.topology import Target

DAY = 86_400.0
# Speed of a V100 in OpenAI's runs: iGPT-L at 32x32 took 2,500 V100-days (their blog post) for 1.13e21 model FLOPs.
V100_FLOPS = 5.2e12


@dataclasses.dataclass(frozen=True)
class RunCost:
    """A whole run without interruptions.

    Attributes:
      days: of wall time.
      v100_days: the same model FLOPs on V100s, at the speed of OpenAI's runs.
      save_seconds: time to write one checkpoint.
      save_every_seconds: the best interval between checkpoints (Young's formula).
    """
    days: float
    device_hours: float
    v100_days: float
    dollars: float
    checkpoint_bytes: int
    save_seconds: float
    save_every_seconds: float


def run_cost(config: PlanConfig, target: Target, step_seconds: float, model_flops: float, checkpoint_bytes: int
             ) -> RunCost:
    """Computes what `config.steps` steps cost.

    The interval between checkpoints that loses the least time is sqrt(2 x seconds of a save x mean seconds between
    failures) (Young 1974; Daly 2006 corrects it for slow saves).

    Args:
      step_seconds: of one step.
      model_flops: of one step over all devices, causal half.
      checkpoint_bytes: of the whole training state.
    """
    seconds = config.steps * step_seconds
    hours = seconds / 3600 * target.devices
    price = target.chip.dollars_per_hour if config.dollars_per_device_hour < 0 else config.dollars_per_device_hour
    save = checkpoint_bytes / (config.save_gigabytes_per_second * 1e9)
    between_failures = 1000 * DAY / (config.failures_per_1000_device_days * target.devices)
    return RunCost(seconds / DAY, hours, config.steps * model_flops / V100_FLOPS / DAY, hours * price,
                   checkpoint_bytes, save, math.sqrt(2 * save * between_failures))
