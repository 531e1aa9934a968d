"""Small JSON files that jobs write for later jobs. No result depends on them, so a damaged one stops no job."""

import logging
from typing import Any

from igpt_jax.storage.files import read
from igpt_jax.storage.json import parse_json
from igpt_jax.storage.paths import Path

DAMAGED = ".damaged"  # suffix of a damaged file that was renamed

log = logging.getLogger(__name__)


def look(file: Path, kind: type = dict) -> Any:
    """The value in a JSON file; None if the file is missing or damaged, or the value is not of type `kind`.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        value = parse_json(read(file)) if file.exists() and not file.is_dir() else None
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, kind) else None


def load(file: Path, kind: type = dict) -> Any:
    """Like `look`, for a file of the job's own workdir: a damaged file is set aside and logged.

    Raises:
      UserError: the file cannot be read.
    """
    value = look(file, kind)
    if value is None and file.exists():
        set_aside(file)
    return value


def set_aside(file: Path, then: str = "the job continues without it") -> None:
    """Renames a damaged file to NAME.damaged (or NAME.damaged-2, ... if that exists) and logs that, with what happens
    `then`."""
    number, to = 1, file.parent / f"{file.name}{DAMAGED}"
    while to.exists():
        number += 1
        to = file.parent / f"{file.name}{DAMAGED}-{number}"
    file.rename(to)
    log.error("%s is damaged. It is renamed to %s, and %s.", file, to.name, then)
