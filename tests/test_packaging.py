"""The wheel and the source distribution: built and installed without a network, and run outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, patience

from igpt_jax import __version__, command_line

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(command, folder, **more):
    done = subprocess.run(list(map(str, command)), cwd=folder, text=True, capture_output=True, timeout=patience(),
                          env={**os.environ, **more})
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind, source, to):
    return to / run([sys.executable, "-c", BUILD, f"build_{kind}", to], source).splitlines()[-1]


@pytest.fixture(scope="module")
def built(folder):
    """(wheel, wheel of the source distribution), from a copy of what git would commit."""
    files = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for file in files:
        if (ROOT / file).exists():
            (folder / "source" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / "source" / file)
    archive = build("sdist", folder / "source", folder)
    shutil.unpack_archive(archive, folder / "unpacked")
    (folder / "again").mkdir()
    return (build("wheel", folder / "source", folder),
            build("wheel", folder / "unpacked" / archive.name.removesuffix(".tar.gz"), folder / "again"))


def test_the_wheel_is_complete(built):
    """Every file of the package and every config. Seen to fail without setup.py's copy and MANIFEST.in."""
    names = [{name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} for wheel in built]
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "igpt_jax").rglob("*.*")
               if "__pycache__" not in file.parts}
    configs = {f"igpt_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert names[0] == names[1] == package | configs and "igpt_jax/py.typed" in package


def test_the_installed_program_runs_outside_the_checkout(built, folder):
    """`igpt` with a config by name. Seen to fail without the folder `igpt_jax/configs` of the wheel."""
    target, elsewhere = folder / "target", folder / "elsewhere"
    elsewhere.mkdir()
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={target}", built[0]],
        elsewhere)
    igpt = [sys.executable, target / "bin" / "igpt"]
    assert run([*igpt, "--version"], elsewhere, PYTHONPATH=str(target)) == f"igpt_jax {__version__}\n"
    printed = run([*igpt, "pretrain", "--config=igpt_l", "--print_config"], elsewhere, PYTHONPATH=str(target))
    assert '"name": "igpt_l"' in printed


@pytest.mark.parametrize("words, completed", [
    (["pre"], ["prepare", "pretrain"]), (["pretrain", "--config.optimizer.l"], ["--config.optimizer.learning_rate="]),
    (["pretrain", "--config", "=", "igpt_l_"], ["igpt_l_48", "igpt_l_bert"]),
    (["pretrain", "--config.model.name", "=", "igpt_t"], ["igpt_tiny"]),
])
def test_completion(words, completed, monkeypatch):
    """As bash calls it, with words split at `=`."""
    printed = []
    monkeypatch.setattr(command_line.process, "say", lambda text, *_: printed.append(text))
    assert command_line.main(["completion"]) == 0
    script = f'{printed[0]}\nCOMP_WORDS=(igpt "$@") COMP_CWORD=$#; _igpt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    assert run(["bash", "-c", script, "bash", *words], ROOT).splitlines() == completed
