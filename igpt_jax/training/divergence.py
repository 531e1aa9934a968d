"""Diverged runs, devices whose copies of the state differ, and the replay of logged steps."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import jax

from igpt_jax import checkpoint, storage
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.metrics.logging import load_metrics, say
from igpt_jax.parallel import checksums
from igpt_jax.runtime.exits import Diverged
from igpt_jax.runtime.watchdog import Watchdog
from igpt_jax.storage import side_files

DIVERGENCE = "divergence.json"  # read by skip_divergence: where in the data order the run diverged
REPLAY_TOLERANCE = 1e-3  # relative, of a loss: other devices and meshes sum in another order


def advice(checkpoints: checkpoint.Checkpoints, accepted: int) -> str:
    """Advice after a divergence whose last accepted update was that of step `accepted`.

    All saved parameters are finite, but their loss need not be. A checkpoint is known to be good if a later update was
    accepted, or if it was evaluated: then a finite loss was computed from its parameters.
    """
    saved, lower = checkpoints.steps, "with a lower optimizer.learning_rate or with optimizer.clip_norm"
    if not saved:
        return ("No checkpoint was saved before. Start past these examples (--config.skip_divergence=True), or in a "
                f"new --workdir {lower}.")
    newest, good = saved[-1], [step for step in saved if step < accepted or checkpoints.is_evaluated(step)]
    how = f"resume past these examples (--config.skip_divergence=True), or {lower}, named in --config.accept_changes"
    if newest in good:
        return f"The newest checkpoint, step {newest:,}, is good: {how}."
    other = (f"remove checkpoints/{newest}: step {good[-1]:,} is good" if good else
             f"start in a new --workdir, {lower}")
    return (f"Since the newest checkpoint, step {newest:,}, no loss was finite: {how}. If that diverges at once, "
            f"{other}.")


def note(workdir: str, newest_checkpoint: int, position: int) -> None:
    """Records for `skip_divergence` that the run diverged, `position` steps into the data order."""
    if jax.process_index() == 0:
        try:
            storage.publish(storage.path(workdir) / DIVERGENCE,
                            json.dumps({"newest_checkpoint": newest_checkpoint, "position": position}))
        except OSError as error:  # the run ends with the divergence, not with the full disk
            say(f"{DIVERGENCE} could not be written, so skip_divergence will skip nothing: {error}")


def offset_after(config: PretrainConfig, workdir: str, start: int, offset: int) -> int:
    """The run's offset: the examples of a step are those of step + offset in the data order.

    Example: a run diverged 70 steps into the data order, and its newest checkpoint is step 60. It resumes with offset
    10, so its step 60 reads the examples that follow those of the diverged step.

    Args:
      config: with `skip_divergence`, the offset moves past the examples on which the run diverged.
      workdir: of the run.
      start: step that the run resumes from.
      offset: offset in the checkpoint of `start`.
    """
    file = storage.path(workdir) / DIVERGENCE
    noted = config.skip_divergence and checkpoint.from_process_0(lambda: side_files.load(file)) or {}
    # Later checkpoints hold the offset themselves. The newest one then may have been removed as bad.
    if start <= noted.get("newest_checkpoint", -1) and isinstance(noted.get("position"), int):
        return noted["position"] - start
    return offset


def compare_replicas(step: int, state: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Raises Diverged with the names of devices whose copies of the state differ from the others' in any bit."""
    odd = checksums.odd_devices(state, mesh)
    if odd:
        array, devices = next(iter(odd.items()))
        raise Diverged(f"replicas of {len(odd)} arrays differ between devices at step {step:,}: {array} on "
                       f"{', '.join(devices)}. Nothing is saved. Take that device out of service: the same command "
                       "then resumes from the newest checkpoint.")


def replay(workdir: str, checkpoints: checkpoint.Checkpoints, abstract_of: checkpoint.AbstractOf,
           metadata: checkpoint.Metadata, do_step: Callable, batches_from: Callable, watchdog: Watchdog) -> None:
    """Repeats logged steps and compares the loss: the fewest steps that lead from a checkpoint to a logged step.

    Only steps that were trained with the settings and the data offset of the checkpoint before them.

    Raises:
      UserError: the loss differs from the logged one.
    """
    span = _span(workdir, checkpoints, metadata) if jax.process_index() == 0 else None
    before, after, expected, rate = checkpoint.of_process_0(span)
    restored = checkpoints.restore(abstract_of, metadata, at=before) if after else None
    if not restored or restored[1].steps_done != before:
        say("replay_check: no logged step follows a good checkpoint of these settings; nothing is repeated")
        return
    state, stored = restored
    with contextlib.closing(batches_from(before + stored.data_offset)) as batches:
        for step in range(before, after):
            watchdog.beat(f"repeating step {step + 1:,}")
            state, measured = do_step(state, next(batches))
    # After the newest checkpoint the run may have been trained with other settings for a while.
    if rate is not None and not math.isclose(rate, float(measured["train/learning_rate"]), rel_tol=1e-5):
        say(f"replay_check: step {after:,} was logged at another learning rate; nothing is compared")
        return
    loss = float(measured["train/nats_per_pixel"])
    difference = abs(loss - expected) / abs(expected)
    if not difference <= REPLAY_TOLERANCE:
        raise UserError(f"replay_check: step {after:,} repeated from checkpoint {before:,} gives the loss {loss!r}, "
                        f"but the log says {expected!r}. The code, the data or a device has changed.")
    same = "the same loss, bit for bit" if difference == 0 else f"the loss differs by {difference:.1e}"
    say(f"replay_check: step {after:,} repeated from checkpoint {before:,}: {same}")


def _span(workdir: str, checkpoints: checkpoint.Checkpoints, metadata: checkpoint.Metadata
          ) -> tuple[int, int, float | None, float | None]:
    """The steps to repeat: (checkpoint, logged step, its loss, its learning rate); the step is 0 if there is none."""
    lines = []
    with contextlib.suppress(UserError):  # without a log there is nothing to repeat; the other processes wait
        lines = load_metrics(workdir)
    logged = {line["step"]: line for line in lines if line.get("train/nats_per_pixel") is not None}
    steps = checkpoints.steps
    offsets = {step: checkpoints.data_offset(step, metadata) for step in steps}
    if not (storage.path(workdir) / DIVERGENCE).exists():  # or the steps after the newest one may have had another
        offsets[math.inf] = offsets[steps[-1]]
    spans = [(before, after) for before, later in itertools.pairwise(offsets) for after in logged
             if before < after <= later and offsets[before] == offsets[later] is not None]
    # Of the shortest spans, the newest.
    before, after = min(spans, key=lambda span: (span[1] - span[0], -span[0]), default=(0, 0))
    line = logged.get(after, {})
    return before, after, line.get("train/nats_per_pixel"), line.get("train/learning_rate")
