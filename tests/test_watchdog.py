"""The watchdog: a process without progress ends with exit code 76 and its stacks; a slow or compiling one continues."""

import pytest


def test_a_process_without_progress_is_ended_with_its_stacks(run_job):
    """Seen to fail with a watchdog that counts from its own start."""
    done = run_job("2", "5", "0.5", "hang", script="stall.py")
    assert done.returncode == 76
    assert "process 0 has made no progress for 2 s while doing step 4" in done.stderr
    assert 'stall.py", line 19 in hang' in done.stderr, done.stderr


@pytest.mark.parametrize("steps, seconds, then", [("8", "0.5", "stop"), ("1", "0", "compile")],
                         ids=["slow", "compiles"])
def test_a_slow_or_compiling_process_continues(run_job, steps, seconds, then):
    """Seen to fail with beats that are ignored, and without the check for the compiler."""
    done = run_job("3", steps, seconds, then, script="stall.py")
    assert done.returncode == 0 and "came through" in done.stdout, done.stderr


def test_the_compiler_is_in_the_file_that_the_watchdog_knows(run_job):
    """Another version of JAX may compile elsewhere. Seen to fail with another file's name."""
    done = run_job(script="watch_compiler.py")
    assert done.returncode == 0, done.stderr
