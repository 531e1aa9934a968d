"""What `make quickstart` and `make test` install, and how tests behave without a package or with a killed worker."""

import os
import shutil
import subprocess
import sys

import conftest
import pytest
from conftest import ROOT, SCRIPTS, patience


@pytest.mark.parametrize(("target", "extras"), [("quickstart", None), ("test", ".[test,huggingface]")])
def test_only_the_tests_install_torch(tmp_path, target, extras):
    """Seen to fail with quickstart's environment made by the tests' augment."""
    # Variables of the make that runs the tests would reach this one.
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("MAKEFLAGS", "MAKELEVEL", "TEST_EXTRAS")}
    done = subprocess.run(["make", "--dry-run", target, f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    installed = [line.split("--editable ")[1].strip("'") for line in done.stdout.splitlines() if "--editable" in line]
    assert installed == [".", *filter(None, [extras])], done


def test_a_worker_that_dies_ends_the_run(tmp_path):
    """pytest starts no other worker in its place, which may hang. Seen to fail without --max-worker-restart."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(SCRIPTS / "killed_worker.py", tmp_path / "tests" / "test_killed.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"], cwd=tmp_path, text=True,
                          env=environment, capture_output=True, timeout=patience(10))
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("crashed while running") == 2  # in its report and in the summary


@pytest.mark.parametrize(("missing", "outcome"), [
    ("torch", pytest.skip.Exception), ("tensorflow", pytest.skip.Exception), ("jax", ModuleNotFoundError)])
def test_tests_of_a_large_package_are_skipped_without_it(missing, outcome):
    """Seen to fail with every missing module treated like torch."""
    attempt = conftest._skip_without_large()
    next(attempt)
    try:
        raise ModuleNotFoundError(name=missing)
    except ModuleNotFoundError as error:
        with pytest.raises((ModuleNotFoundError, pytest.skip.Exception)) as raised:
            attempt.throw(error)
    assert raised.type is outcome
