"""Finished checkpoints as they appear: those that a comma list or glob names now, and those of its runs to come."""

import contextlib
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax import storage
from igpt_jax.checkpoint.reading import is_checkpoint, locate, steps_of
from igpt_jax.config import UserError
from igpt_jax.storage import side_files

TRAINING = ("pretrain", "finetune")  # the jobs whose workdirs get checkpoints as they go


def listed(typed: str) -> list[str]:
    """DIR/checkpoints/STEP of all that a comma list of workdirs (the newest step), steps and globs names, each once, by
    step.

    A glob may match what is no finished checkpoint, such as one that a run is just writing; it is passed over.

    Raises:
      UserError: it names none; or what is named without a glob is none.
    """
    found = set()
    for pattern in storage.patterns(typed):
        matches = storage.matching(pattern)
        named = storage.path(pattern) in matches
        found |= {locate(str(match)) for match in matches if named or is_checkpoint(str(match))}
    if not found:
        raise _none(typed)
    return _by_step(found)


def follow(typed: str, idle_seconds: float, poll_seconds: float) -> Iterator[str | None]:
    """Yields every step of the runs that `typed` names, each once, oldest first, as they appear; None where it waits.

    Ends when all these runs are done, says their result.json; or after `idle_seconds` (0: never) in which none came.
    What is typed need not be there yet.

    Raises:
      UserError: there was none until the end.
    """
    seen: set[str] = set()
    since = time.monotonic()
    while True:
        done = _done(typed)  # asked before the steps are listed: then what a run saved last is among them
        new = [step for step in _steps(typed) if step not in seen]
        if new:
            seen.add(new[0])
            yield new[0]
            since = time.monotonic()
        elif done or 0 < idle_seconds <= time.monotonic() - since:
            break
        else:
            yield None
            time.sleep(poll_seconds)
    if not seen:
        raise _none(typed)


def in_slice(step: str, i: int, n: int) -> bool:
    """Whether a checkpoint belongs to slice i of n: by its path, so that slices that start at different times, while
    the runs go on, still share all checkpoints without a gap or an overlap."""
    return zlib.crc32(step.encode()) % n == i


def on_all_processes(steps: Iterator[str | None]) -> Iterator[str]:
    """The steps that process 0 finds; the others, to which a disk may show other files, take the same ones.

    They hear of each None too, since a collective that waits for long fails.
    """
    if jax.process_count() == 1:
        yield from filter(None, steps)
        return
    while True:
        found: dict[str, str | None] = {}
        if jax.process_index() == 0:
            try:
                found = {"step": next(steps)}
            except StopIteration:
                pass
            except UserError as error:
                found = {"error": str(error)}
        found = json.loads(_from_process_0(json.dumps(found).encode()))
        if "error" in found:
            raise UserError(found["error"])
        if not found:
            return
        if found["step"]:
            yield found["step"]


def _from_process_0(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    row = np.frombuffer(data, np.uint8) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(row), np.uint8))


def run_of(step: str) -> storage.Path:
    """The workdir of the run that saved a step (DIR of DIR/checkpoints/STEP)."""
    return storage.path(step).parent.parent


def _none(typed: str) -> UserError:
    return UserError(f"checkpoints={typed!r} names no finished checkpoint. "
                     "Set --config.checkpoints to workdirs of pretrain or steps of one.")


def _by_step(found: set[tuple[str, int]]) -> list[str]:
    return [str(storage.path(folder) / str(step)) for folder, step in sorted(found, key=lambda pair: pair[::-1])]


def _matches(typed: str) -> list[storage.Path]:
    """What there is now of what was typed."""
    found = []
    for pattern in storage.patterns(typed):
        try:
            found += storage.matching(pattern)
        except UserError:  # not there yet
            continue
    return found


def _steps(typed: str) -> list[str]:
    """Every finished step of the workdirs, and the steps, that there are now."""
    found = set()
    for path in _matches(typed):
        with contextlib.suppress(UserError):  # nothing finished yet
            folder, steps = steps_of(str(path))
            found |= {(folder, step) for step in steps}
    return _by_step(found)


def _done(typed: str) -> bool:
    """Whether there are runs, and all of them have come to their end."""
    runs = {str(run_of(step)) for step in _steps(typed)}
    runs |= {str(path) for path in _matches(typed) if _told(path / "config.json", "job") in TRAINING}
    return bool(runs) and all(_told(storage.path(run) / "result.json", "status") == "done" for run in runs)


def _told(file: storage.Path, name: str) -> Any:
    """An entry of a JSON file of another job; None where it is not there yet."""
    try:
        return (side_files.look(file) or {}).get(name)
    except UserError:
        return None
