"""Exit codes and arguments of the benchmarks: as for the jobs, bad input is one line and exit code 2."""

import argparse
import contextlib
import json
import lzma
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from igpt_jax.config import UserError
from igpt_jax.runtime.exits import INPUT


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code of `main`; with 2, after one line, on a UserError or a file out of reach."""
    try:
        sys.exit(main())
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.filename is None:  # not about a file that was given
            raise
        problem = f"{error.filename}: {error.strerror}. Check the path."
    print(f"{pathlib.Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    sys.exit(INPUT)


@contextlib.contextmanager
def readable(file: Any, kind: str) -> Iterator[None]:
    """Raises UserError where the code inside finds that a file is not of its kind."""
    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise UserError(f"{file} is not {kind}: {error}. Name another file.") from None


def read_json(file: pathlib.Path) -> Any:
    """The value in a JSON file. Raises UserError if it is damaged."""
    with readable(file, "a JSON file"):
        return json.loads(file.read_bytes())


# Types of argparse.

def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Positive integers with commas between them."""
    return tuple(map(count, filter(None, text.split(","))))


def pattern(text: str) -> re.Pattern:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
