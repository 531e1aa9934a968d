"""TensorBoard and Weights & Biases: the values that they receive, restarts, and failures that cost no run."""

import importlib.util
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from igpt_jax import storage
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.metrics import writers
from igpt_jax.metrics.logging import Metrics, load_metrics
from igpt_jax.training import loop


def config(wandb=""):
    given = base_config("pretrain")
    given.wandb = wandb
    return parse("pretrain", given)


def run(workdir, steps):
    metrics = Metrics(workdir, steps, writers=writers.open_writers(config(), workdir))
    for step in range(1, steps + 1):
        metrics.log(step, {"train/nats_per_pixel": 1 / step})
    metrics.close()


def scalars(data):
    """(step, tag, value) of a TensorBoard file: records of a length, its checksum, the event and its checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12:12 + length]), data[16 + length:]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_receives_scalars_and_its_failure_is_harmless(tmp_path, capsys):
    """Seen to fail with step and value exchanged."""
    run(tmp_path, 2)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert [each for each in scalars(events.read_bytes()) if each[1] == "train/nats_per_pixel"] == [
        (1, "train/nats_per_pixel", 1.0), (2, "train/nats_per_pixel", 0.5)]

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("a file, where TensorBoard needs a folder")
    run(tmp_path / "other", 20)  # more lines than tensorboardX's own queue holds
    assert capsys.readouterr().err.count("TensorBoard is off") == 1
    assert len(load_metrics(tmp_path / "other")) == 20


def test_tensorboard_does_not_import_torch(tmp_path, python):
    """Seen to fail with a plain import: a run started 5 s later on a loaded machine."""
    python(f"""
import sys
from igpt_jax.metrics import writers
board = writers.TensorBoard({str(tmp_path)!r})
board.write(1, 1.8e9, {{"train/nats_per_pixel": 2.0}})
board.close()
assert "torch" not in sys.modules and "tensorboardX" in sys.modules
""", devices=1)


def test_tensorboard_in_a_bucket_is_published_whole(monkeypatch):
    published = {}
    monkeypatch.setattr(storage, "publish", lambda path, data: published.update({str(path): data}))
    board = writers.TensorBoard("gs://bucket/run/tensorboard")
    for step in (1, 2):
        board.write(step, 1.8e9, {"train/nats_per_pixel": step / 4})
    board.close()
    ((name, data),) = published.items()
    assert name.startswith("gs://bucket/run/tensorboard/events")
    assert scalars(data) == [(1, "train/nats_per_pixel", 0.25), (2, "train/nats_per_pixel", 0.5)]


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_without_wandb_the_run_does_not_start(tmp_path, monkeypatch, folder_of_that_name):
    """A folder ./wandb, which W&B creates and Python would import, does not count. Seen to fail without that case."""
    if folder_of_that_name:
        (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"wandb='digits'.*pip install '\.\[wandb\]'"):
        loop.train(config("digits"), str(tmp_path / "run"))


WANDB = """
import os, signal, sys
from igpt_jax.metrics import writers
from igpt_jax.config import base_config, parse
config = base_config("pretrain")
config.wandb = "digits"
*_, writer = writers.open_writers(parse("pretrain", config), sys.argv[1])
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: make wandb")
class TestWeightsAndBiases:
    """The real library, offline. Each process is one start of the run."""

    @staticmethod
    def start(python, workdir, script, **env):
        return python(WANDB.replace("sys.argv[1]", repr(str(workdir))) + script, devices=1,
                      env={"WANDB_MODE": "offline", **env}).stderr

    def test_all_starts_write_to_one_run(self, python, tmp_path):
        """Each value arrives, also of a repeated step. Seen to fail with a new id at each start."""
        for steps in ((1, 2), (2, 3)):
            log = self.start(python, tmp_path, f"""
for step in {steps}:
    writer.write(step, 1.8e9, {{"train/nats_per_pixel": step + 0.0625}})
writer.close()
""")
            assert "wandb sync" in log and "is off" not in log
        first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        assert first.name == second.name == f"run-{(tmp_path / 'wandb_id').read_text()}.wandb"
        for file, values in ((first, (b"1.0625", b"2.0625")), (second, (b"2.0625", b"3.0625"))):
            assert all(value in file.read_bytes() for value in values)

    def test_a_killed_wandb_process_is_harmless(self, python, tmp_path):
        """The run continues and reports it once. Seen to fail with errors passed on."""
        log = self.start(python, tmp_path, """
(service,) = open(f"/proc/self/task/{os.getpid()}/children").read().split()
os.kill(int(service), signal.SIGKILL)
for step in range(1, 21):
    writer.write(step, 1.8e9, {"train/nats_per_pixel": 2.0})
writer.close()
""")
        assert log.count("Weights & Biases is off for this run") == 1

    def test_a_missing_login_is_harmless(self, python, tmp_path):
        log = self.start(python, tmp_path, "writer.write(1, 1.8e9, {'a': 1.0})\nwriter.close()", WANDB_MODE="online",
                          HOME=str(tmp_path), WANDB_API_KEY="")
        assert log.count("is off for this run: nobody is logged in") == 1
