"""Features of all layers, the solver against scikit-learn, and the probe job."""

import csv
import json

import jax
import numpy as np
import pytest
from conftest import run_all, run_job_command
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from test_model import random_parameters
from threadpoolctl import threadpool_limits

from igpt_jax import storage
from igpt_jax.config import ModelConfig, ProbingConfig
from igpt_jax.config.data import ProbeDataConfig
from igpt_jax.data.store import Writer
from igpt_jax.evaluation import linear_probe, probing
from igpt_jax.model import features
from igpt_jax.model.attention import attention
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.layers import norm


@pytest.mark.parametrize("kind", features.KINDS)
def test_features_equal_layer_by_layer_computation(kind):
    """Against models cut off after 0, 1, 2, 3 blocks, whose final stream is read off. Seen to fail with the feature
    taken after the block, and with the attention norm of the block before."""
    config = ModelConfig("igpt_tiny", layers=3, embed=24, heads=2)
    model = Model(config, 13, 5, "float32")
    params = random_parameters(model)
    tokens_BT = np.random.default_rng(0).integers(0, 13, (4, 25))
    found = jax.jit(features.pooled, static_argnums=(0, 3))(model, params, tokens_BT, kind)
    for layer in range(4):
        cut = Model(ModelConfig("igpt_tiny", layers=max(layer, 1), embed=24, heads=2), 13, 5, "float32")
        blocks = jax.tree.map(lambda x, layer=layer: x[:max(layer, 1)], params["blocks"])
        gpt = cut.bind({**params, "blocks": blocks})
        x_BTD = gpt.embed(tokens_BT)
        if layer:
            def body(block, x_BTD, _):
                q, k, v = block.qkv(x_BTD)
                return block.after_attention(x_BTD, attention(q, k, v, causal=True, backend="reference")), None
            x_BTD, _ = gpt.scan_blocks(body, x_BTD)
        gain_D = params["blocks"]["attention_norm_D"][layer] if layer < 3 else params["final_norm_D"]
        expected = (norm(x_BTD, gain_D) if kind == "normalized" else x_BTD).mean(1)
        np.testing.assert_allclose(found[layer], expected, atol=1e-5)


def clusters(count, dims, classes, seed=0):
    random = np.random.default_rng(seed)
    mix = random.normal(size=(dims, dims)) * np.exp(-np.arange(dims) / dims * 3)[:, None]  # features correlate
    x_ED = random.normal(size=(count, dims)) @ mix
    noise = 2 * random.gumbel(size=(count, classes))
    labels = (x_ED @ random.normal(size=(dims, classes)) / dims ** 0.5 + noise).argmax(1)
    return (5 + 3 * x_ED).astype(np.float32), labels


def test_the_solver_finds_scikit_learns_optimum():
    """Objective within 1e-6 relative, predictions equal on 99.9 %, for two penalties solved at once.

    Seen to fail with the biases penalized too, and with the penalty doubled.
    """
    x_ED, labels = clusters(3000, 24, 4)
    penalties = (1e-4, 1e-2)
    for l2, probe in zip(penalties, linear_probe.fit(x_ED, labels, 4, penalties), strict=True):
        standard = (x_ED.astype(np.float64) - x_ED.mean(0, dtype=np.float64)) / x_ED.std(0, dtype=np.float64)
        with threadpool_limits(1):  # its idle threads spin
            theirs = LogisticRegression(C=1 / (l2 * len(x_ED)), tol=1e-7, max_iter=5000).fit(standard, labels)

        def objective(weights, biases, standard=standard, l2=l2):
            logits = standard @ weights + biases
            entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
            return entropy.mean() + l2 / 2 * (weights ** 2).sum()

        ours = objective(probe.weights_DK.astype(np.float64), probe.biases_K.astype(np.float64))
        assert ours / objective(theirs.coef_.T, theirs.intercept_) - 1 < 1e-6
        assert (probe.predict(x_ED) == theirs.predict(standard)).mean() >= 0.999


def test_sgd_comes_close_to_the_optimum():
    """Training accuracy within 1 point of L-BFGS's, for the best of three learning rates.

    Seen to fail with the gradient added to the weights.
    """
    x_ED, labels = clusters(2000, 20, 4)
    random = np.random.default_rng(0)
    batches = [random.integers(0, 2000, 256) for _ in range(300)]
    best = max(probe.accuracy(x_ED, labels) for probe in
               linear_probe.fit_sgd(x_ED, labels, 4, (3.0, 0.3, 0.03), batches, len(batches)))
    (exact,) = linear_probe.fit(x_ED, labels, 4, (1e-4,))
    assert abs(best - exact.accuracy(x_ED, labels)) < 0.01


def test_held_out_images_as_test_images_are_not_fit_on():
    """Random labels: held-out accuracy stays at chance. Seen to fail with the last fit on train and held-out images."""
    random = np.random.default_rng(0)
    splits = [random.normal(size=(count, 250)).astype(np.float32) for count in (200, 60)]
    labels = [random.integers(0, 2, len(split)) for split in splits]
    prober = object.__new__(probing.Prober)
    prober.classes, prober.config = 2, ProbingConfig(data=ProbeDataConfig(test="held_out"))
    found = prober.row(probing.Labeled([*splits, splits[1][:, None]], [*labels, labels[1]]))
    assert found["test_accuracy"] < 0.8


def test_the_probes_solvers_agree():
    """solver=sgd, as `--config=imagenet_probe` sets it. Seen to fail with one step."""
    x_ED, labels = clusters(900, 20, 4)
    splits = [slice(0, 500), slice(500, 700), slice(700, 900)]
    data = probing.Labeled([x_ED[splits[0]], x_ED[splits[1]], x_ED[splits[2]][:, None]],
                           [labels[each] for each in splits])
    found = {}
    for solver, keys in (("lbfgs", {}), ("sgd", {"steps": 300, "rates": (3.0, 0.3)})):
        prober = object.__new__(probing.Prober)
        prober.classes, prober.config = 4, ProbingConfig(solver=solver, **keys)
        found[solver] = prober.row(data)
    assert abs(found["sgd"]["test_accuracy"] - found["lbfgs"]["test_accuracy"]) <= 0.03
    assert found["sgd"]["solver"] == "sgd" and found["sgd"]["chosen"] in (3.0, 0.3)


def test_wilson_interval():
    """Against the published example of 15 of 148 (Newcombe 1998, Table I). Seen to fail with z = 2."""
    np.testing.assert_allclose(linear_probe.wilson(15 / 148, 148), (0.0624, 0.1605), atol=5e-5)


def save_store(folder, labeled):
    """30 images of three splits, whose training split lacks class 3."""
    writer = Writer(storage.path(folder), 8)
    images = np.zeros((10, 8, 8, 3), np.uint8)
    for split, classes in (("train", 3), ("held_out", 4), ("test", 4)):
        writer.add(split, images, np.arange(10, dtype=np.int32) % classes if labeled else None)
    palette_VC = np.linspace(-1, 1, 51, dtype=np.float32).reshape(17, 3)
    writer.finish(palette_VC, source="", resize="", seed=0, held_out={}, config={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    digits = load_digits()
    images = np.repeat((digits.images * 255 / 16).astype(np.uint8)[..., None], 3, -1)
    for name, part in (("train", slice(0, 797)), ("test", slice(797, 1797))):
        np.savez(folder / f"{name}.npz", images=images[part], labels=digits.target[part])
    prepare = ["prepare", f"--workdir={folder / 'store'}", f"--config.source=npz:{folder / 'train.npz'}",
               f"--config.test_source=npz:{folder / 'test.npz'}", "--config.palette=fit:17"]
    pretrain = ["pretrain", f"--workdir={folder / 'run'}", f"--config.data.store={folder / 'store'}",
                "--config.model.name=igpt_tiny", "--config.model.layers=2", "--config.model.embed=32",
                "--config.steps=30", "--config.batch_size=32", "--config.precision=float32",
                "--config.optimizer.warmup_steps=5", "--config.eval_every_steps=0"]
    for code, log in run_all(prepare, pretrain):
        assert code == 0, log
    return folder


@pytest.fixture(scope="module")
def probed(trained):
    workdir = trained / "probe"
    done = run_job_command("probe", f"--workdir={workdir}", f"--config.checkpoint={trained / 'run'}",
                           "--config.labels_per_class=(4,)", "--config.draws=2", "--config.concatenate=3",
                           "--config.l2=(0.01, 0.1)", "--config.batch_size=64")
    assert done.returncode == 0, done.stderr
    return workdir


def test_the_job_probes_every_layer(probed):
    """A row for each layer, their concatenation, baselines, and few labels of each; a table with intervals, a curve."""
    workdir = probed
    found = json.loads((workdir / "result.json").read_text())["metrics"]
    assert list(found["accuracy_by_layer"]) == ["0", "1", "2"]
    assert found["raw_pixel_accuracy"] > 0.8 and found["untrained_accuracy"] > 0.2
    with open(workdir / "probe.csv", newline="") as file:
        names = [row["features"] for row in csv.DictReader(file)]
    assert names[:3] == ["layer 0", "layer 1", "layer 2"] and len(names) == 9, names
    few = [name.removesuffix(", 4 labels per class") for name in names if name.endswith("labels per class")]
    assert few == [f"layer {found['best_layer']}", "raw pixels", names[6]] and names[5] == "raw pixels", names
    assert names[3].startswith("layers ") and names[6].startswith("untrained model, layer "), names
    for row in json.loads((workdir / "probe.json").read_text())[:3]:
        expected = linear_probe.wilson(found["accuracy_by_layer"][str(row["layer"])], 1000)
        np.testing.assert_allclose(row["interval"], expected)
    assert (workdir / "figures" / "accuracy_by_layer.png").stat().st_size > 10_000


@pytest.mark.parametrize(("kind", "names"), [
    ("knn", ["layer 0", "layer 2", "kNN, layer 0", "kNN, layer 2", "raw pixels", "untrained model, layer 0",
             "kNN, raw pixels", "kNN, untrained model, layer"]),
    ("attention", ["layer 0", "layer 2", "attention pooling, layer", "raw pixels", "untrained model, layer 0",
                   "attention pooling, untrained model, layer 0"])])
def test_other_kinds_add_rows(trained, kind, names):
    """Rows beside the linear ones, the best of them in result.json. Seen to fail with the untrained rows left out."""
    workdir = trained / kind
    done = run_job_command("probe", f"--workdir={workdir}", f"--config.checkpoint={trained / 'run'}",
                           f"--config.kind={kind}", "--config.layers=(0,2)", "--config.limit=200",
                           "--config.batch_size=64", *(["--config.steps=20"] if kind == "attention" else []))
    assert done.returncode == 0, done.stderr
    rows = json.loads((workdir / "probe.json").read_text())
    assert len(rows) == len(names) and all(row["features"].startswith(name)
                                           for row, name in zip(rows, names, strict=True)), rows
    found = json.loads((workdir / "result.json").read_text())["metrics"]
    mine, = {row["test_accuracy"] for row in rows[2:4] if row.get("layer") == found[f"{kind}_layer"]}
    assert found[f"{kind}_accuracy"] == mine and list(found["accuracy_by_layer"]) == ["0", "2"]


def test_one_device_and_eight_agree_and_evaluate_probes_as_the_probe_job(trained, probed):
    """In float64: nats to 1e-8, and accuracies of all layers within 1 prediction per 1,000, on 1,000 test images.

    Seen to fail with the features of each batch in another order than its labels.
    """
    found = {}
    for devices in (1, 8):
        workdir = trained / f"evaluate{devices}"
        done = run_job_command("evaluate", f"--workdir={workdir}", f"--config.checkpoints={trained / 'run'}",
                               "--config.data.split=test", "--config.probe=True", "--config.batch_size=96",
                               "--config.probing.l2=(0.01, 0.1)", "--config.precision=float64", devices=devices)
        assert done.returncode == 0, done.stderr
        (found[devices],) = json.loads((workdir / "evaluation.json").read_text())
        assert (workdir / "figures" / "accuracy_by_layer.png").stat().st_size > 10_000
    one, eight = found[1], found[8]
    np.testing.assert_allclose(eight["nats_per_pixel"], one["nats_per_pixel"], rtol=1e-8)
    probe = json.loads((probed / "result.json").read_text())["metrics"]["accuracy_by_layer"]
    for first, second in zip(one["accuracy_by_layer"], eight["accuracy_by_layer"], strict=True):
        assert abs(first["test_accuracy"] - second["test_accuracy"]) <= 1 / 1000 + 1e-9
        assert abs(first["test_accuracy"] - probe[str(first["layer"])]) <= 1 / 1000 + 1e-9


BAD = {
    "labels_per_class=(5000,)": "Ask for fewer",
    "layers=(3,)": "choose among 0 (the embedding) to 2",
    "data.test=tast": "Did you mean 'test'?",
    "data.test=train": "train is also fitted on",
    "l2=(0.0,)": "must be positive",
    "concatenate=2": "must be odd",
    "data.store={trained}/unlabeled": "has no labels",
    "data.store={trained}/one_missing": "class 3 has no example in split 'train'",
    "data.store={trained}/one_missing,{trained}/store": "probes read one pixel store",
    "checkpoint={trained}/unfinished/checkpoints/99": "holds no checkpoint",  # is still being written
}


@pytest.fixture(scope="module")
def refused(trained):
    """{setting: (exit code, standard error)}."""
    (trained / "unfinished" / "checkpoints" / "99" / "params").mkdir(parents=True)
    for store in ("unlabeled", "one_missing"):
        save_store(trained / store, labeled=store != "unlabeled")
    # held_out alone only has a note, which must not stand before an error.
    commands = [["probe", f"--workdir={trained}/bad", f"--config.checkpoint={trained}/run",
                 "--config.data.test=held_out", f"--config.{each.format(trained=trained)}"] for each in BAD]
    return dict(zip(BAD, run_all(*commands), strict=True))


@pytest.mark.parametrize("setting", BAD)
def test_bad_input_is_one_line(refused, setting):
    """Exit code 2."""
    code, log = refused[setting]
    assert code == 2 and BAD[setting] in log and len(log.splitlines()) == 1, log
