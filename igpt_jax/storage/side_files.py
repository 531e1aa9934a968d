"""Small JSON files that jobs write for later jobs. No result depends on them, so a damaged one stops no job."""

import logging
from typing import Any

from igpt_jax.storage.files import read
from igpt_jax.storage.json import parse_json
from igpt_jax.storage.paths import Path

DAMAGED, FORMER = ".damaged", ".former"  # suffixes of files that were renamed

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


def no_longer_done(folder: Path) -> None:
    """Removes a former command's result.json from a workdir whose other files are about to be replaced."""
    (folder / "result.json").unlink(missing_ok=True)


def set_aside(file: Path, suffix: str = DAMAGED, why: str = "is damaged", then: str = "the job continues without it"
              ) -> None:
    """Renames a file to NAME.damaged (or NAME.damaged-2, ... if that exists). Logs `why`, and what happens `then`."""
    number, to = 1, file.parent / f"{file.name}{suffix}"
    while to.exists():
        number += 1
        to = file.parent / f"{file.name}{suffix}-{number}"
    file.rename(to)
    log.error("%s %s. It is renamed to %s, and %s.", file, why, to.name, then)
