"""Tests of the benchmarks: comparing figures, and the slices of gpu.sh on tiny shapes."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def compare(tmp_path, before, after):
    for name, figures in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps(figures))
    done = subprocess.run([sys.executable, ROOT / "benchmarks/compare.py", tmp_path / "before", tmp_path / "after"],
                          capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def figures(seconds, **more):
    return {"device": "a", "tokens": 64, "rows": [{"name": "ours", "seconds": seconds}], **more}


def test_compare_finds_slower_rows_and_refuses_other_hardware(tmp_path):
    """Seen to fail with the ratio inverted."""
    assert compare(tmp_path, figures(1.0), figures(1.04, jax="0.11"))[0] == 0
    code, output = compare(tmp_path, figures(1.0), figures(1.2))
    assert code == 1 and "1.20  SLOWER" in output
    code, output = compare(tmp_path, figures(1.0), figures(1.0, device="b"))
    assert code == 2 and output.count("\n") == 1 and "device='b' (before: 'a')" in output
    assert compare(tmp_path, figures(1.0), {"rows": [{"name": "theirs", "seconds": 1.0}]})[0] == 2
    assert compare(tmp_path, figures(1.0), [])[0] == 2


STAND_IN = """#!/bin/sh
[ "$1" != -c ] || exit {has_torch}
while [ "$1" != --json ]; do shift; done
echo '{{"rows": []}}' > "$2"
echo "plain GPT: failed" >&2
exit 1
"""


@pytest.mark.parametrize(("has_torch", "slice_", "files", "message"), [
    (0, "peers", {"peers_2x32x2_8.json", "peers_2x32x2_8.log"}, "exit code 1: plain GPT: failed"),
    (1, "peers", set(), "pip install '.[huggingface]'"),
    (1, "kernels", {"kernel_1x64x2x16.json", "kernel_1x64x2x16.log"}, "exit code 1")])
def test_a_failed_candidate_loses_no_figures(tmp_path, has_torch, slice_, files, message):
    """Seen to fail with the figures moved only if no candidate failed."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(has_torch=has_torch))
    python.chmod(0o755)
    done = subprocess.run([ROOT / "benchmarks/gpu.sh", slice_, python, tmp_path / "out"], text=True,
                          capture_output=True, env={**os.environ, "TINY": "1"})
    assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


@pytest.mark.slow
@pytest.mark.parametrize("slice_", ["kernels", "steps", "flags", "sampling", "peers"])
def test_gpu_slices(tmp_path, slice_):
    """On tiny shapes and the CPU, each writes its files, and a second run measures nothing again."""
    def run(*arguments, **more):
        return subprocess.run([ROOT / "benchmarks/gpu.sh", *arguments], capture_output=True, text=True,
                              env={**os.environ, "TINY": "1", **more})

    done = run(slice_, sys.executable, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(tmp_path.iterdir())
    assert files and all(file.suffix == ".json" and json.loads(file.read_text()) for file in files)
    done = run(slice_, sys.executable, tmp_path)
    assert done.returncode == 0 and not done.stdout, done.stdout
    (tmp_path / files[0]).unlink()
    done = run(slice_, sys.executable, tmp_path, SLICE_SECONDS="1")
    assert done.returncode == 1 and "run it again" in done.stdout
