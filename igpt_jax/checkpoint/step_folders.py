"""The folders of checkpoints, one per step: which are finished, and how one goes without ever looking whole."""

import logging
import os
import re
from typing import Any

from igpt_jax import storage

COMMITTED = "commit_success.txt"  # Orbax writes it into a step last, on every kind of storage
DELETING = ".deleting"
NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # not 007, nor what else int() takes for a number
LEFT = re.compile(rf"({NUMBER.pattern})({DELETING}|\.orbax-checkpoint-tmp.*)")  # the latter: steps that Orbax began
QUARANTINE = "quarantine"

log = logging.getLogger(__name__)


def steps_in(folder: Any) -> list[int]:
    """The finished steps in a directory of checkpoints, ascending; what is still being written does not count."""
    return sorted(int(step.name) for step in _numbered(storage.path(folder)) if is_step(step))


def _numbered(folder: storage.Path) -> list[storage.Path]:
    """The folders of steps, finished or not. An empty folder of a bucket is none."""
    return [child for child in folder.iterdir() if NUMBER.fullmatch(child.name)] if folder.is_dir() else []


def is_step(path: storage.Path) -> bool:
    """Whether `path` is a finished step, whatever its name."""
    return (path / COMMITTED).exists()


def resolved(step: storage.Path) -> storage.Path:
    """A step by its own name, where it is a link to it, or `.`, that was typed."""
    if storage.is_local(step) and not NUMBER.fullmatch(step.name):
        return storage.path(os.path.realpath(step))
    return step


def directory_of_steps(path: storage.Path) -> storage.Path:
    """Where the steps of `path` lie, a workdir or already that directory; what is in it tells, not its name."""
    inside = path / "checkpoints"
    return inside if inside.exists() else path


def step_path(folder: Any, step: int) -> storage.Path:
    """The absolute path of a step in a directory of checkpoints."""
    return storage.absolute(storage.path(folder)) / str(step)


def sweep(folder: storage.Path) -> None:
    """Removes what killed runs left: parts of saves and of removals. On a local disk a step appears whole or not
    at all, so one without its mark has lost it."""
    for child in list(folder.iterdir()):
        if LEFT.fullmatch(child.name) and child.is_dir():
            child.rmtree()
    for child in _numbered(folder):
        if not is_step(child) and child.is_dir():
            if storage.is_local(child):
                log.error("Checkpoint %s is damaged: %s is missing. It goes to %s/.", child.name, COMMITTED, QUARANTINE)
                quarantine(folder, int(child.name), f"{COMMITTED} is missing")
            else:
                child.rmtree()


def quarantine(folder: storage.Path, step: int, problem: str) -> None:
    """Moves a step out of the way, with what is wrong with it."""
    to = folder.parent / QUARANTINE / str(step)
    while to.exists():
        to = to.parent / f"{to.name}-again"
    to.parent.mkdir(exist_ok=True)
    if os.path.islink(folder / str(step)):  # what it leads to stays as it is
        problem += f" (the link to {os.readlink(folder / str(step))})"
        os.unlink(folder / str(step))
    else:
        (folder / str(step)).rename(to)
    storage.publish(to / "problem.txt", f"{problem}\n")


def remove(step: storage.Path) -> None:
    """Removes a step so that no kill leaves a part of it that looks whole; of a link, the link."""
    if os.path.islink(step):
        return os.unlink(step)
    if storage.is_local(step):
        step = step.rename(step.parent / f"{step.name}{DELETING}")
    else:
        (step / COMMITTED).unlink()
    step.rmtree()
