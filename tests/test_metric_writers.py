"""TensorBoard and Weights & Biases: what they get, over restarts, and that their failures are harmless."""

import importlib.util
import sys

import pytest

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


def test_tensorboard_gets_scalars_and_its_failure_is_harmless(tmp_path, capsys):
    run(tmp_path, 2)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/nats_per_pixel") == 2

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("a file, where TensorBoard needs a folder")
    run(tmp_path / "other", 20)  # more lines than tensorboardX's own queue holds
    assert capsys.readouterr().err.count("TensorBoard is off") == 1
    assert len(load_metrics(tmp_path / "other")) == 20


def test_tensorboard_does_without_torch(tmp_path, python):
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
        board.write(step, 1.8e9, {"train/nats_per_pixel": 2.0})
    board.close()
    ((name, data),) = published.items()
    assert name.startswith("gs://bucket/run/tensorboard/events") and data.count(b"train/nats_per_pixel") == 2


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_without_wandb_the_run_does_not_start(tmp_path, monkeypatch, folder_of_that_name):
    """Also where ./wandb is a folder, such as W&B leaves, which Python would import. Seen to fail without that case."""
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
    """The real library, offline; each process is a start of the run."""

    @staticmethod
    def start(python, workdir, script, **env):
        return python(WANDB.replace("sys.argv[1]", repr(str(workdir))) + script, devices=1,
                      env={"WANDB_MODE": "offline", **env}).stderr

    def test_all_starts_write_to_one_run(self, python, tmp_path):
        """Each value arrives, that of a step done again too. Seen to fail with an id of each start's own."""
        for steps in ((1, 2), (2, 3)):
            told = self.start(python, tmp_path, f"""
for step in {steps}:
    writer.write(step, 1.8e9, {{"train/nats_per_pixel": step + 0.0625}})
writer.close()
""")
            assert "wandb sync" in told and "is off" not in told
        first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        assert first.name == second.name == f"run-{(tmp_path / 'wandb_id').read_text()}.wandb"
        for file, values in ((first, (b"1.0625", b"2.0625")), (second, (b"2.0625", b"3.0625"))):
            assert all(value in file.read_bytes() for value in values)

    def test_its_end_is_harmless(self, python, tmp_path):
        """Its process is killed; the run goes on and says so once. Seen to fail with errors let through."""
        told = self.start(python, tmp_path, """
(service,) = open(f"/proc/self/task/{os.getpid()}/children").read().split()
os.kill(int(service), signal.SIGKILL)
for step in range(1, 21):
    writer.write(step, 1.8e9, {"train/nats_per_pixel": 2.0})
writer.close()
""")
        assert told.count("Weights & Biases is off for this run") == 1

    def test_nobody_logged_in_is_harmless(self, python, tmp_path):
        told = self.start(python, tmp_path, "writer.write(1, 1.8e9, {'a': 1.0})\nwriter.close()", WANDB_MODE="online",
                          HOME=str(tmp_path), WANDB_API_KEY="")
        assert told.count("is off for this run: nobody is logged in") == 1
