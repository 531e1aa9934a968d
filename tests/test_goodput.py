"""Goodput: every second of a run counts as one phase, as lost or as down, across crashes too."""

import json
import time

import pytest

from igpt_jax import storage
from igpt_jax.metrics.logging import Metrics, metrics_lines
from igpt_jax.metrics.phases import PhaseTimer, goodput


class Clock:
    """Replaces the wall clock and the monotonic clock."""

    def __init__(self):
        self.now = 1.8e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def test_each_second_is_in_one_phase(clock):
    """Nested phases, and a phase that an error ends.

    Seen to fail with `enter` that does not add up the phase it leaves, and without the `finally` (the time after the
    error counted as the save's).
    """
    timer = PhaseTimer("start", clock)
    clock.now += 1
    with timer("compile"):
        clock.now += 2
    timer.enter("step")
    clock.now += 4
    with timer("evaluate"):
        clock.now += 8
        with timer("input"):
            clock.now += 16
        clock.now += 32
    with pytest.raises(OSError):
        with timer("save"):
            clock.now += 64
            raise OSError
    clock.now += 128
    assert timer.read() == {"seconds/start": 1, "seconds/compile": 2, "seconds/step": 132, "seconds/evaluate": 40,
                             "seconds/input": 16, "seconds/save": 64}
    clock.now += 256
    assert timer.read() == {"seconds/step": 256} and timer.read() == {}


def run(workdir, clock, start, stop, down=0.0):
    """A process that starts `down` seconds later, takes 10 s to start and 2 s per step, and dies after step `stop`."""
    clock.now += down
    timer = PhaseTimer("start", clock)
    clock.now += 10
    metrics = Metrics(workdir, 20, start, timer)
    timer.enter("step")
    for step in range(start + 1, stop + 1):
        clock.now += 2
        metrics.log(step, {"train/nats_per_pixel": 1.0})
    metrics.close()


@pytest.mark.parametrize("in_a_bucket", [False, True])
def test_lost_and_down_time_add_up_to_the_wall_time(tmp_path, clock, in_a_bucket, monkeypatch):
    """Three crashes. After the first, at step 7, the run resumes from 5. After the second, at step 6, it resumes from 5
    again; the line of step 6 had recorded what the first crash lost. The third comes before anything is logged. In a
    bucket, lines cannot be removed.

    Seen to fail with the start of a process counted as down too, with the lost seconds of an undone line forgotten, and
    with undone lines still counted.
    """
    monkeypatch.setattr(storage, "is_local", lambda path: not in_a_bucket)
    monkeypatch.setattr(storage, "LineWriter", Lines)
    began = clock.now
    run(tmp_path, clock, 0, 7)
    run(tmp_path, clock, 5, 6, down=100)
    clock.now += 1000  # starts, and dies before it logs
    run(tmp_path, clock, 5, 20, down=50)
    found = goodput(metrics_lines(tmp_path))
    # Starting is counted with the first line, so the second process' 10 s are lost with its only step.
    assert found == {"seconds/start": 20, "seconds/step": 40, "seconds/lost": 2 * 2 + 10 + 2, "seconds/down": 1150,
                     "goodput": pytest.approx(40 / 1226)}
    assert sum(value for name, value in found.items() if name != "goodput") == clock.now - began


class Lines:
    """A line writer that writes at once."""

    def __init__(self, path):
        self._path, self.error = path, None

    def write(self, line):
        with open(self._path, "a") as file:
            file.write(json.dumps(json.loads(line)) + "\n")

    def flush(self):
        pass

    close = flush
