"""Writes tables into pages, between two marks."""

import pathlib

from igpt_jax.config import UserError


def replace(page: pathlib.Path, marks: tuple[str, str], text: str) -> None:
    """Replaces what a page has between its marks. Raises UserError where it lacks one of them."""
    before, first, rest = page.read_text().partition(marks[0])
    _, second, after = rest.partition(marks[1])
    if not (first and second):
        raise UserError(f"{page} lacks the mark {marks[1] if first else marks[0]}. Restore it.")
    page.write_text(f"{before}{first}\n{text}\n{second}{after}")
