"""From the seconds of a step to the whole run: days, money, checkpoints."""

import dataclasses
import math

from igpt_jax.config import PlanConfig
from igpt_jax.parallel.topology import Target

DAY = 86_400.0
# The paper's unit. iGPT-L at 32x32 took 2,500 V100-days (OpenAI's blog post) for 1.13e21 model FLOPs: 5.2 TFLOP/s each.
V100_FLOPS = 5.2e12


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A whole run without interruptions. save_seconds is one checkpoint's; save_every_seconds is Young's interval."""
    days: float
    device_hours: float
    v100_days: float
    dollars: float
    checkpoint_bytes: int
    save_seconds: float
    save_every_seconds: float


def schedule(config: PlanConfig, target: Target, step_seconds: float, model_flops: float, checkpoint_bytes: int
             ) -> Schedule:
    """What `config.steps` steps cost.

    Args:
      step_seconds: of one step.
      model_flops: of one step over all devices, causal half.
      checkpoint_bytes: of the whole state.

    The interval between checkpoints that loses least time is sqrt(2 x seconds of a save x mean seconds between
    failures) (Young 1974; Daly 2006 corrects it where saving is slow).
    """
    seconds = config.steps * step_seconds
    hours = seconds / 3600 * target.devices
    price = target.chip.dollars_per_hour if config.dollars_per_device_hour < 0 else config.dollars_per_device_hour
    save = checkpoint_bytes / (config.save_gigabytes_per_second * 1e9)
    between_failures = 1000 * DAY / (config.failures_per_1000_device_days * target.devices)
    return Schedule(seconds / DAY, hours, config.steps * model_flops / V100_FLOPS / DAY, hours * price,
                    checkpoint_bytes, save, math.sqrt(2 * save * between_failures))
