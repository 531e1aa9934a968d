"""What a run does that diverged, or whose devices, code or data are not what they were."""

import json
from collections.abc import Callable
from typing import Any

import jax

from igpt_jax import checkpoint, storage
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.metrics.logging import load_metrics, say
from igpt_jax.parallel import checksums
from igpt_jax.runtime.exits import Diverged
from igpt_jax.storage import side_files

DIVERGENCE = "divergence.json"  # what skip_divergence needs: up to where in the order the examples were bad
REPLAY_TOLERANCE = 1e-3  # relative, of a loss; other devices and meshes sum in another order


def advice(checkpoints: checkpoint.Checkpoints, accepted: int) -> str:
    """What to do after a divergence whose last accepted update was that of step `accepted`.

    All saved parameters are finite. Those to which a later update was accepted, or which were evaluated, gave a finite
    loss too.
    """
    saved, lower = checkpoints.steps, "with a lower optimizer.learning_rate or with optimizer.clip_norm"
    if not saved:
        return f"No checkpoint was saved before. Start in a new --workdir, {lower}."
    newest, good = saved[-1], [step for step in saved if step < accepted or checkpoints.is_evaluated(step)]
    how = f"resume past these examples (--config.skip_divergence=True), or {lower}, named in --config.accept_changes"
    if newest in good:
        return f"The newest checkpoint, step {newest:,}, is good: {how}."
    other = (f"remove checkpoints/{newest}: step {good[-1]:,} is good" if good else
             f"start in a new --workdir, {lower}")
    return (f"Since the newest checkpoint, step {newest:,}, no loss was finite: {how}. If that diverges at once, "
            f"{other}.")


def note(workdir: str, newest_checkpoint: int, position: int) -> None:
    """Writes down, for `skip_divergence`, up to where in the order the run used the examples and has diverged."""
    if jax.process_index() == 0:
        storage.publish(storage.path(workdir) / DIVERGENCE,
                        json.dumps({"newest_checkpoint": newest_checkpoint, "position": position}))


def offset_after(config: PretrainConfig, workdir: str, start: int, offset: int) -> int:
    """How many steps of examples to be ahead of the step's own: past those on which the run diverged, if it did.

    Args:
      config: says whether to skip them.
      workdir: the run's.
      start: step that the run resumes from.
      offset: that of its checkpoint.
    """
    file = storage.path(workdir) / DIVERGENCE
    read = side_files.load if jax.process_index() == 0 else side_files.look
    noted = config.skip_divergence and read(file) or {}
    if noted.get("newest_checkpoint") == start:  # later checkpoints hold the offset themselves
        return noted["position"] - start
    return offset


def compare_replicas(step: int, state: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Raises Diverged where devices that should hold the same bits do not; names them."""
    odd = checksums.odd_devices(state, mesh)
    if odd:
        array, devices = next(iter(odd.items()))
        raise Diverged(f"copies of {len(odd)} arrays differ between devices at step {step:,}: of {array} those on "
                       f"{', '.join(devices)}. Nothing is saved. Take that device out of service: the same command "
                       "then resumes from the newest checkpoint.")


def replay(workdir: str, checkpoints: checkpoint.Checkpoints, abstract: dict[str, Any], metadata: checkpoint.Metadata,
           do_step: Callable, batches_from: Callable) -> None:
    """Repeats steps of the log, from the newest of the checkpoints with the nearest logged step after them.

    Raises:
      UserError: the loss is not the one in the log.
    """
    logged = {line["step"]: line["train/nats_per_pixel"] for line in load_metrics(workdir)
              if line.get("train/nats_per_pixel") is not None}
    ways = [(after - before, -before) for before in checkpoints.steps for after in logged if after > before]
    before = -min(ways)[1] if ways else 0
    restored = checkpoints.restore(abstract, metadata, at=before) if ways else None
    if not restored or restored[1].steps_done != before:
        say("replay_check: no logged step follows a good checkpoint; nothing is repeated")
        return
    after = before + min(ways)[0]
    state, stored = restored
    batches = batches_from(before + stored.data_offset)
    for _ in range(before, after):
        state, measured = do_step(state, next(batches))
    loss = float(measured["train/nats_per_pixel"])
    difference = abs(loss - logged[after]) / abs(logged[after])
    if not difference <= REPLAY_TOLERANCE:
        raise UserError(f"replay_check: step {after:,} repeated from checkpoint {before:,} gives the loss {loss!r}, "
                        f"but the log says {logged[after]!r}. The code, the data or a device has changed.")
    same = "the same loss, bit for bit" if difference == 0 else f"the loss differs by {difference:.1e}"
    say(f"replay_check: step {after:,} repeated from checkpoint {before:,}: {same}")
