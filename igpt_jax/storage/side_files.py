"""The small JSON files that jobs write for later jobs. Results do not depend on them, so a damaged one stops no job."""

import logging
from typing import Any

from igpt_jax.storage.files import read
from igpt_jax.storage.json import parse_json
from igpt_jax.storage.paths import Path

DAMAGED = ".damaged"  # ends the name of a file that was set aside

log = logging.getLogger(__name__)


def look(file: Path, kind: type = dict) -> Any:
    """What a JSON file holds; None where it is missing, damaged, or no `kind`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        value = parse_json(read(file)) if file.exists() else None
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, kind) else None


def load(file: Path, kind: type = dict) -> Any:
    """`look`, at a file of the job's own workdir: a damaged one is set aside, as a line says.

    Raises:
      UserError: it cannot be read.
    """
    value = look(file, kind)
    if value is None and file.exists():
        set_aside(file)
    return value


def set_aside(file: Path, then: str = "the job goes on without it") -> None:
    """Renames a damaged file to NAME.damaged, or NAME.damaged-2 and so on where there is one; says so, and what then
    is done."""
    number, to = 1, file.parent / f"{file.name}{DAMAGED}"
    while to.exists():
        number += 1
        to = file.parent / f"{file.name}{DAMAGED}-{number}"
    file.rename(to)
    log.error("%s is damaged. It is renamed to %s, and %s.", file, to.name, then)
