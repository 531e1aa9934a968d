"""Finds checkpoints, and waits for new ones of runs in progress."""

import contextlib
import time
import zlib
from collections.abc import Iterator
from typing import Any

from igpt_jax import storage
from igpt_jax.checkpoint.arrays import from_process_0
from igpt_jax.checkpoint.reading import is_checkpoint, locate, steps_of
from igpt_jax.config import UserError
from igpt_jax.storage import side_files

TRAINING = ("pretrain", "finetune")  # jobs that write checkpoints while they run


def listed(checkpoints: str) -> list[str]:
    """Finds the checkpoints that a comma list names now.

    Args:
      checkpoints: workdirs (each stands for its newest step), steps, or globs of either, separated by commas. Matches
        of a glob that are not finished checkpoints are skipped.

    Returns:
      Paths DIR/checkpoints/STEP without duplicates, ordered by step.

    Raises:
      UserError: no checkpoint was found, or a path that is no glob is not a checkpoint.
    """
    found = set()
    for pattern in storage.patterns(checkpoints):
        matches = storage.matching(pattern)
        named = storage.path(pattern) in matches
        found |= {locate(str(match)) for match in matches if named or is_checkpoint(str(match))}
    if not found:
        raise _none(checkpoints)
    return _by_step(found)


def follow(checkpoints: str, idle_seconds: float, poll_seconds: float) -> Iterator[str | None]:
    """Yields every step of the named runs once, oldest first, as they are saved; None before each wait.

    Ends when the result.json of all these runs says that they are done.

    Args:
      checkpoints: a comma list as in `listed`. Its paths need not exist yet.
      idle_seconds: also end after this long without a new step; 0: never.
      poll_seconds: time between two looks for new steps.

    Raises:
      UserError: no checkpoint was found until the end.
    """
    seen: set[str] = set()
    since = time.monotonic()
    while True:
        # Checked before the steps are listed: a run that is done by now has saved its last step before.
        done = _done(checkpoints)
        new = [step for step in _steps(checkpoints) if step not in seen]
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
        raise _none(checkpoints)


def in_slice(step: str, i: int, n: int) -> bool:
    """Whether the checkpoint `step` belongs to slice i of n. Every path belongs to exactly one slice."""
    # By a hash of the path, not by its index in a list: slices that start at different times, while runs save new
    # steps, would see different lists.
    return zlib.crc32(step.encode()) % n == i


def on_all_processes(steps: Iterator[str | None]) -> Iterator[str]:
    """Yields the steps of process 0's `steps` on all processes; a shared disk may show the others older files."""
    # Each None is sent too, since a collective fails if it waits for long.
    while (step := from_process_0(lambda: next(steps, ""))) != "":
        if step:
            yield step


def run_of(step: str) -> storage.Path:
    """The workdir of the run that saved a step (DIR of DIR/checkpoints/STEP)."""
    return storage.path(step).parent.parent


def _none(checkpoints: str) -> UserError:
    return UserError(f"checkpoints={checkpoints!r} names no finished checkpoint. "
                     "Set --config.checkpoints to workdirs of pretrain or steps of one.")


def _by_step(found: set[tuple[str, int]]) -> list[str]:
    """Paths of (directory of steps, step), ordered by step."""
    return [str(storage.path(folder) / str(step)) for folder, step in sorted(found, key=lambda pair: pair[::-1])]


def _matches(checkpoints: str) -> list[storage.Path]:
    """The paths of a comma list that exist now."""
    found = []
    for pattern in storage.patterns(checkpoints):
        try:
            found += storage.matching(pattern)
        except UserError:  # nothing matches yet
            continue
    return found


def _steps(checkpoints: str) -> list[str]:
    """All finished steps of the named workdirs, and the named steps."""
    found = set()
    for path in _matches(checkpoints):
        with contextlib.suppress(UserError):  # nothing is finished yet
            folder, steps = steps_of(str(path))
            found |= {(folder, step) for step in steps}
    return _by_step(found)


def _done(checkpoints: str) -> bool:
    """Whether there are runs and all of them are done."""
    runs = {str(run_of(step)) for step in _steps(checkpoints)}
    runs |= {str(path) for path in _matches(checkpoints) if _entry(path / "config.json", "job") in TRAINING}
    return bool(runs) and all(_entry(storage.path(run) / "result.json", "status") == "done" for run in runs)


def _entry(file: storage.Path, name: str) -> Any:
    """An entry of another job's JSON file; None if the file is missing or damaged."""
    try:
        return (side_files.look(file) or {}).get(name)
    except UserError:
        return None
