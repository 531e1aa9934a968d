"""Checkpoint folders, one per step: which are finished, quarantine, removal.

No kill at any moment leaves a partial step that looks finished.
"""

import logging
import os
import re
from typing import Any

from igpt_jax import storage

COMMITTED = "commit_success.txt"  # Orbax writes it into a step last, on every kind of storage
DELETING = ".deleting"
NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # stricter than int(), which also accepts 007 and digits of other scripts
LEFTOVER = re.compile(rf"({NUMBER.pattern})({DELETING}|\.orbax-checkpoint-tmp.*)")  # our removals, Orbax's saves
QUARANTINE = "quarantine"

log = logging.getLogger(__name__)


def steps_in(folder: Any) -> list[int]:
    """The finished steps in a directory of checkpoints, ascending. A step that is still being written is left out."""
    return sorted(int(step.name) for step in _numbered(storage.path(folder)) if is_step(step))


def _numbered(folder: storage.Path) -> list[storage.Path]:
    """The folders of steps, finished or not; empty if there is no such directory, as in a bucket without objects."""
    return [child for child in folder.iterdir() if NUMBER.fullmatch(child.name)] if folder.is_dir() else []


def is_step(path: storage.Path) -> bool:
    """Whether `path` is a finished step, whatever its name."""
    return (path / COMMITTED).exists()


def resolved(step: storage.Path) -> storage.Path:
    """The step's path under its own number, if `step` is `.` or a link to it such as `latest`."""
    if storage.is_local(step) and not NUMBER.fullmatch(step.name):
        return storage.path(os.path.realpath(step))
    return step


def directory_of_steps(path: storage.Path) -> storage.Path:
    """The directory of steps of `path`, which is a workdir or that directory itself."""
    # A workdir may itself be named `checkpoints`, so its content decides, not its name.
    inside = path / "checkpoints"
    return inside if inside.exists() else path


def step_path(folder: Any, step: int) -> storage.Path:
    """The absolute path of a step in a directory of checkpoints."""
    return storage.absolute(storage.path(folder)) / str(step)


def sweep(folder: storage.Path) -> None:
    """Removes the leftovers of killed runs: unfinished saves and unfinished removals."""
    for child in list(folder.iterdir()):
        if LEFTOVER.fullmatch(child.name) and child.is_dir():
            child.rmtree()
    for child in _numbered(folder):
        if not is_step(child) and child.is_dir():
            # On a local disk a step appears by a rename, complete with its mark: without the mark it is damaged.
            # In a bucket it is written in place: without the mark it is unfinished.
            if storage.is_local(child):
                log.error("Checkpoint %s is damaged: %s is missing. It is moved to %s/.", child.name, COMMITTED,
                          QUARANTINE)
                quarantine(folder, int(child.name), f"{COMMITTED} is missing")
            else:
                child.rmtree()


def quarantine(folder: storage.Path, step: int, problem: str) -> None:
    """Moves a step to quarantine/ and writes `problem` into its problem.txt. If the step is a link, only the link is
    removed."""
    to = folder.parent / QUARANTINE / str(step)
    while to.exists():
        to = to.parent / f"{to.name}-again"
    to.parent.mkdir(exist_ok=True)
    if os.path.islink(folder / str(step)):
        problem += f" (the link to {os.readlink(folder / str(step))})"
        os.unlink(folder / str(step))
    else:
        (folder / str(step)).rename(to)
    storage.publish(to / "problem.txt", f"{problem}\n")


def remove(step: storage.Path) -> None:
    """Removes a step. A kill in between leaves no partial step that looks finished. Of a link, only the link goes."""
    if os.path.islink(step):
        return os.unlink(step)
    if storage.is_local(step):
        step = step.rename(step.parent / f"{step.name}{DELETING}")
    else:
        (step / COMMITTED).unlink()
    step.rmtree()
