"""Every command that the documents show is one that the command line takes."""

import pathlib
import re
import shlex

import pytest

from igpt_jax import __main__ as command_line
from igpt_jax.config import JOBS

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]


def commands(text: str) -> list[list[str]]:
    """The words after `python -m igpt_jax` of each indented command: continued lines joined, shell variables 1."""
    lines = re.sub(r"\$\w+", "1", re.sub(r"\\\n\s*", " ", text)).splitlines()
    found = [line.split("python -m igpt_jax ", 1)[1] for line in lines
             if line.startswith("    ") and "python -m igpt_jax " in line]
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(document, monkeypatch):
    """Job, flags, config files, keys and values; what paths lead to is not looked at. Seen to fail with a key of the
    README misspelt."""
    monkeypatch.chdir(ROOT)
    for job, *words in commands(document.read_text()):
        if job in JOBS:  # JOB, in lines that show the form
            command_line._parse(job, words)


def test_all_jobs_are_shown():
    """Each job has a command in a document."""
    shown = {job for document in DOCUMENTS for job, *_ in commands(document.read_text())}
    assert shown >= set(JOBS)
