"""The finetune job as users run it: stopped and resumed, on other devices, with early stopping, with bad input."""

import json
import re
import sys

import numpy as np
import pytest
from conftest import run_all, run_job_command
from sklearn.datasets import load_digits
from test_jobs import TINY, arrays, losses, result, stopped_at_step_4

STEPS = 12
COMMON = [f"--config.steps={STEPS}", "--config.batch_size=16", "--config.log_every_steps=1",
          "--config.eval_every_steps=6", "--config.checkpoint_every_steps=5"]


def ran(*commands, **options):
    for code, log in run_all(*commands, **options):
        assert code == 0, log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """store and store4: digits at 8x8 and 4x4; ar, bert: pretrained on the first."""
    folder = tmp_path_factory.mktemp("finetune")
    stores = [["prepare", f"--workdir={folder / name}", "--config.source=digits:train", f"--config.image_size={size}",
               "--config.test_source=digits:test"] for name, size in (("store", 8), ("store4", 4))]
    runs = [["pretrain", f"--workdir={folder / name}", f"--config.data.store={folder / 'store'}", *TINY,
             f"--config.objective={objective}"] for name, objective in (("ar", "autoregressive"), ("bert", "masked"))]
    ran(*stores, *runs)
    return folder


def finetune(folder, name, *more):
    return ["finetune", f"--workdir={folder / name}", *COMMON, "--config.precision=float64",
            f"--config.checkpoint={folder / 'ar'}", "--config.data.augment=cifar", *more]


@pytest.fixture(scope="module")
def tuned(folder):
    """The undisturbed run, on one device, through tf.data."""
    ran(finetune(folder, "straight", "--config.data.reader=tfdata"))
    return folder / "straight"


def test_a_stopped_run_resumes_bit_for_bit(folder, tuned):
    """SIGTERM in the middle, then the same command: parameters, moments, logged losses and accuracies of the
    undisturbed run, the class head's among them."""
    command = finetune(folder, "stopped", "--config.data.reader=tfdata")
    code, rest = stopped_at_step_4([sys.executable, "-m", "igpt_jax", *command])
    assert code == 75 and re.search(r"stopped after step \d+ of", rest), rest
    again = run_job_command(*command)
    assert again.returncode == 0 and "resuming from step" in again.stderr, again.stderr
    one, other = arrays(tuned), arrays(folder / "stopped")
    assert one.keys() == other.keys() and np.abs(one["[0]['class_head_KD']"]).max() > 0
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    assert losses(tuned) == losses(folder / "stopped")
    for name in ("test_accuracy", "eval/accuracy", "best_step"):
        assert result(tuned)["metrics"][name] == result(folder / "stopped")["metrics"][name]


def test_eight_devices_give_the_losses_of_one(folder, tuned):
    """data x fsdp x tensor = 2 x 2 x 2 and the resident reader: losses within 1e-8 in float64, accuracies within 1 of
    1,000."""
    ran(finetune(folder, "eight", "--config.data.reader=resident", "--config.mesh.data=2", "--config.mesh.fsdp=2",
                 "--config.mesh.tensor=2"), devices=8)
    one, other = losses(tuned), losses(folder / "eight")
    assert one.keys() == other.keys() and (STEPS, "train/classification_nats") in one
    for key in one:
        assert other[key] == pytest.approx(one[key], rel=1e-8, abs=1e-3 if "accuracy" in key[1] else 1e-12), key
    assert abs(result(tuned)["metrics"]["test_accuracy"] - result(folder / "eight")["metrics"]["test_accuracy"]) <= 1e-3


def test_early_stopping_ends_a_run_for_good(folder):
    """A learning rate too small to change any held-out accuracy: the second and third evaluation are no better than the
    first. The same command again trains no further, nor does one with rarer evaluations. Seen to fail with patience
    counted in steps."""
    arguments = finetune(folder, "patient", "--config.optimizer.learning_rate=1e-30", "--config.eval_every_steps=2",
                         "--config.patience=2", "--config.data.augment=none")
    ran(arguments)
    first = result(folder / "patient")["metrics"]
    ran([*arguments, "--config.eval_every_steps=6"])
    for metrics in (first, result(folder / "patient")["metrics"]):
        assert (metrics["best_step"], metrics["steps"]) == (2, 6)
    assert max(step for step, _ in losses(folder / "patient")) == 6


@pytest.mark.parametrize(("name", "more"), [
    ("masked", ["--config.checkpoint={}/bert", "--config.objective=masked", "--config.model.class_layer=1"]),
    ("resized", ["--config.data.store={}/store4", "--config.data.augment=none"]),
    ("scratch", ["--config.checkpoint=", "--config.model.name=igpt_tiny", "--config.model.layers=2",
                 "--config.model.embed=16", "--config.model.heads=2", "--config.model.dropout=0.1",
                 "--config.data.store={}/store"]),
    ("all", ["--config.data.split=train+held_out", "--config.data.held_out=", "--config.generative_weight=0"])])
def test_other_ways_to_fine_tune(folder, name, more):
    """A masked checkpoint with the head before the last block; another resolution; from scratch; on all labels. The
    evaluate job reads the checkpoints with no more than their path. The accuracy is that of the best step."""
    ran(finetune(folder, name, "--config.precision=float32", *(each.format(folder) for each in more)),
        ["evaluate", f"--workdir={folder / name}-evaluate", f"--config.checkpoints={folder / name}/checkpoints/*",
         "--config.data.split=test"])
    metrics, rows = result(folder / name)["metrics"], folder / f"{name}-evaluate" / "evaluation.json"
    by_step = {row["steps"]: row["accuracy"] for row in json.loads(rows.read_text())}
    best = metrics["best_step"] or metrics["steps"]
    assert metrics["test_accuracy"] == pytest.approx(by_step[best]) and len(by_step) > 1
    assert bool(metrics["best_step"]) == (name != "all")  # which evaluates on nothing


@pytest.mark.parametrize("objective", [pytest.param("denoising", marks=pytest.mark.slow), "diffusion"])
def test_other_objectives_run_from_the_command_line(folder, objective):
    """finetune from scratch, then evaluate and probe. Seen to fail without the objective's row in OBJECTIVES."""
    ran(finetune(folder, objective, "--config.precision=float32", "--config.checkpoint=", *TINY[:4],
                 f"--config.data.store={folder / 'store'}", f"--config.objective={objective}"),
        ["evaluate", f"--workdir={folder / f'{objective}-evaluate'}", f"--config.checkpoints={folder / objective}"],
        ["probe", f"--workdir={folder / f'{objective}-probe'}", f"--config.checkpoint={folder / objective}",
         f"--config.objective={objective}", "--config.strengths=(0.01,)", "--config.baselines=False"])
    nats, = result(folder / f"{objective}-evaluate")["metrics"]["nats_per_pixel"].values()
    assert nats == pytest.approx(result(folder / objective)["metrics"]["eval/nats_per_pixel"], rel=1e-5)


BAD = {
    "another objective": (["--config.checkpoint={}/bert"], "trained with objective=masked, not autoregressive"),
    "nothing": (["--config.checkpoint="], "nothing to train"),
    "both": (["--config.model.name=igpt_s"], "the checkpoint brings its own"),
    "sizes": (["--config.model.layers=3"], "model.layers is set without model.name"),
    "init": (["--config.model.init=paper"], "model.init is set without model.name"),
    "averages of nothing": (["--config.checkpoint=", *TINY, "--config.parameters=ema"], "without a checkpoint"),
    "layer": (["--config.model.class_layer=3"], "must be from 0 (the embedding) to 2"),
    "unlabelled": (["--config.data.store={}/unlabelled", "--config.data.test=held_out"], "has no labels"),
    "class": (["--config.data.store={}/nines", "--config.data.test="], "class 4 has no example in split 'train'"),
    "trained on": (["--config.data.split=train+held_out", "--config.data.held_out=", "--config.data.test=held_out"],
                   "data.test=held_out: held_out is also trained on"),
    "share": (["--config.mask_ratio=0.2"], "has no effect on objective=autoregressive"),
    "patience": (["--config.data.held_out=", "--config.patience=3"], "needs evaluations on held-out images"),
}


def test_bad_input_is_one_line(folder):
    """Missing labels and a class without training images, among others."""
    digits = load_digits()
    images = np.repeat((digits.images * 255 / 16).astype(np.uint8)[..., None], 3, -1)[:300]
    labels = digits.target[:300]
    np.savez(folder / "unlabelled.npz", images=images)
    np.savez(folder / "nines.npz", images=images[labels != 4], labels=labels[labels != 4])
    ran(*(["prepare", f"--workdir={folder / name}", f"--config.source=npz:{folder / name}.npz",
           f"--config.test_source=npz:{folder / name}.npz", "--config.palette=fit:17"]
          for name in ("unlabelled", "nines")))
    commands = [finetune(folder, "bad", *(each.format(folder) for each in more)) for more, _ in BAD.values()]
    for (case, (_, message)), (code, log) in zip(BAD.items(), run_all(*commands), strict=True):
        assert code == 2 and message in log and len(log.splitlines()) == 1, (case, log)


def test_jobs_refuse_masked_checkpoints_unless_the_config_says_masked(folder):
    """sample and probe refuse them in one line. With objective=masked, probe votes over masks, with the same result at
    any batch size."""
    commands = [[job, f"--workdir={folder / job}", f"--config.{key}{folder / 'bert'}"] for job, key in
                (("sample", "checkpoint="), ("probe", "checkpoint="))]
    masked = [["probe", f"--workdir={folder / f'probe{batch_size}'}", f"--config.checkpoint={folder / 'bert'}",
               "--config.objective=masked", "--config.strengths=(0.01,)", "--config.baselines=False",
               f"--config.batch_size={batch_size}"] for batch_size in (64, 100)]
    *refused, first, second = run_all(*commands, *masked)
    for code, log in refused:
        assert code == 2 and "trained with objective=masked" in log and len(log.splitlines()) == 1, log
    assert first[0] == second[0] == 0, (first, second)
    found = [json.loads((folder / f"probe{size}" / "probe.json").read_text()) for size in (64, 100)]
    assert found[0] == found[1] and 0.15 < found[0][2]["test_accuracy"] < 0.8
