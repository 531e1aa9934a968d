"""Every command that the documents show is one that the command line takes; the README's and the notebook's run."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import patience
from PIL import Image

from igpt_jax import command_line
from igpt_jax.config import JOBS

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
# What makes a job of the README one of seconds.
SMALL = {
    "prepare": "--config.image_size=8",
    "pretrain": "--config.model.layers=2 --config.model.embed=16 --config.model.heads=2 --config.steps=6 "
                "--config.batch_size=8 --config.precision=float32",
    "finetune": "--config.steps=4 --config.batch_size=8 --config.precision=float32",
    "sample": "--config.count=2 --config.examples=2 --config.completions=1",
}


def commands(text: str) -> list[list[str]]:
    """The words after `python -m igpt_jax` or `igpt` of each indented command, and of those within a line of text:
    continued lines joined, shell variables 1."""
    lines = re.sub(r"\$\w+", "1", re.sub(r"\\\n\s*", " ", text)).splitlines()
    found = [re.match(r"    (?!.*&&).*?(?:python -m igpt_jax|(?<!\S)igpt) (.*)", line) for line in lines]
    within = [command for command in re.findall(r"`igpt ([^`]+)`", text) if not command.endswith("--help")]
    return [shlex.split(command, comments=True) for command in [*(each[1] for each in found if each), *within]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(document, monkeypatch):
    """Job, flags, config files, keys and values; what paths lead to is not looked at. Seen to fail with a key of the
    README misspelt."""
    monkeypatch.chdir(ROOT)
    for job, *words in commands(document.read_text()):
        assert job in (*JOBS, "JOB")  # JOB, in lines that show the form
        if job != "JOB":
            command_line._parse(job, words)


def test_all_jobs_are_shown():
    """Each job has a command in a document."""
    shown = {job for document in DOCUMENTS for job, *_ in commands(document.read_text())}
    assert shown >= set(JOBS)


def test_links_lead_somewhere():
    """To a file, and to a heading of it as GitHub names them. Seen to fail with a heading renamed."""
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
            file, _, heading = link.partition("#")
            target = document.parent / file if file else document
            assert target.exists(), f"{document.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                names = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
                assert heading in names, f"{document.name}: {link}"


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path):
    """In their order, in a folder with pictures of the test's own and, in place of OpenAI's weights, random ones of the
    same kind. The make targets of the README do the same jobs; `JOB` is a form, not a command. The demo serves until it
    is stopped, so it is left to tests/test_demo.py.

    Seen to fail with a README that prepares no test split, which the probe needs.
    """
    from weights_files import make_huggingface

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    random = np.random.default_rng(0)
    for folder, count in (("pictures/train/cat", 30), ("pictures/train/dog", 30), ("pictures/test/cat", 5),
                          ("pictures/test/dog", 5), ("my_pictures", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    make_huggingface(tmp_path / "models" / "imagegpt-small", "small", 0)
    shown = [words for words in commands((ROOT / "README.md").read_text()) if words[0] in {*JOBS} - {"demo"}]
    assert len(shown) >= 8
    for job, *words in shown:
        pictures = any(word.startswith("--config.images=") for word in words)  # are completed in place of examples
        small = [word for word in SMALL.get(job, "").split() if not (pictures and "examples" in word)]
        done = subprocess.run([sys.executable, "-m", "igpt_jax", job, *words, *small],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{job} {words}\n{done.stderr}"
        (workdir,) = (word.removeprefix("--workdir=") for word in words if word.startswith("--workdir="))
        assert json.loads((tmp_path / workdir / "result.json").read_text())["status"] == "done"


def test_the_notebook_shows_what_it_does():
    """Its outputs are stored, without an error, in a file that is quick to load. Seen to fail with outputs cleared."""
    text = (ROOT / "docs" / "igpt_jax.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output["output_type"] == "error" for output in outputs) and len(text) < 300_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell but the installation, with few steps; it leaves the report."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook: make notebook")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IGPT_SOURCE", "")
    monkeypatch.setenv("IGPT_STEPS", "20")
    notebook = nbformat.read(ROOT / "docs" / "igpt_jax.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=patience(), resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert b"<svg" in (tmp_path / "runs" / "report" / "report.html").read_bytes()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
