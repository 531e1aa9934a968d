"""Decides what is due after a training step: log, evaluate, save, compare replicas, stop early."""

import dataclasses
from collections.abc import Collection

from igpt_jax.config import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Due:
    """What is due after a step."""
    log: bool = False
    evaluate: bool = False
    save: bool = False
    compare_replicas: bool = False
    required: bool = False  # the save does not wait for an accepted update: the last step, a named one, a stop


NOTHING = Due()


def every(step: int, interval: int) -> bool:
    """Whether a step is a multiple of an interval; 0 steps: never."""
    return interval > 0 and step % interval == 0


def due(step: int, config: PretrainConfig, owed: Due = NOTHING, stopping: bool = False, retry: bool = False) -> Due:
    """What is due after `step`.

    Args:
      step: finished steps.
      config: the intervals.
      owed: what was due at an earlier step and was put off, because updates were being skipped.
      stopping: a stop was requested. The run saves and leaves the evaluation to the resumed run.
      retry: the last save failed, and the time to try again has come.
    """
    last, named = step == config.steps, step in config.keep_steps
    evaluate = last or owed.evaluate or every(step, config.eval_every_steps)
    save = evaluate or named or stopping or retry or owed.save or every(step, config.checkpoint_every_steps)
    compare = config.compare_replicas_every_steps
    return Due(log=step == 1 or last or every(step, config.log_every_steps), evaluate=evaluate and not stopping,
               save=save, compare_replicas=compare > 0 and (save or every(step, compare)),
               required=last or named or stopping)


def enough(evaluated: Collection[int], best_step: int | None, config: PretrainConfig) -> bool:
    """Early stopping: whether `patience` evaluations since `best_step` brought no better one.

    Args:
      evaluated: the steps that were evaluated so far, at whatever intervals.
      best_step: the best of them; None: no evaluation counts yet.
      config: of the run.
    """
    patience = config.finetuning.patience if config.finetuning else 0
    return best_step is not None and 0 < patience <= sum(step > best_step for step in evaluated)
