"""Exact loss and loss maps of a whole split, files of tokens, and the evaluate job, in this process."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_model import random_parameters

from igpt_jax import checkpoint, storage
from igpt_jax.config import MeshConfig, ModelConfig, UserError, parse
from igpt_jax.data.codecs import Palette
from igpt_jax.data.store import Store, Writer
from igpt_jax.data.token_file import TokenFile
from igpt_jax.evaluation import exact_loss, loss_maps
from igpt_jax.jobs import evaluate
from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding


def test_every_image_counts_once(tmp_path, monkeypatch):
    """23 images in batches of 1, 8 and 64 give the mean over all at once; an evaluation that gives up gives None.

    Seen to fail with the last batch dropped, and with its padding counted.
    """
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    palette_VC = rng.uniform(-1, 1, (5, 3)).astype(np.float32)
    writer = Writer(storage.path(tmp_path), 4)
    images = rng.integers(0, 256, (23, 4, 4, 3), np.uint8)
    writer.add("test", images, None)
    writer.finish(palette_VC, source="", resize="", seed=0, held_out={}, config={})
    split, codec = Store.open(tmp_path).split("test"), Palette(palette_VC)

    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), 5, 4, "float32")
    params, mesh = random_parameters(model), sharding.make_mesh(MeshConfig())
    tokens = codec.encode(images).astype(np.int32)
    expected = float(objectives.nats_per_token(jax.jit(model.logits)(params, tokens), tokens).mean())
    for batch_size in (1, 8, 64):
        measure = exact_loss.make_measure(model, mesh, batch_size, codec)
        assert measure(params, split) == {"nats_per_pixel": pytest.approx(expected, rel=1e-6)}
    assert measure(params, split, lambda: True) is None


def test_loss_maps_count_each_pixel_once(tmp_path, monkeypatch):
    """Means by position, class and picture, in batches of 7 of 23 images, equal those over all at once.

    Seen to fail with each image given the mean of its batch.
    """
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    palette_VC = random.uniform(-1, 1, (5, 3)).astype(np.float32)
    images, labels = random.integers(0, 256, (23, 4, 4, 3), np.uint8), random.integers(0, 3, 23).astype(np.int32)
    writer = Writer(storage.path(tmp_path), 4)
    writer.add("test", images, labels)
    writer.finish(palette_VC, source="", resize="", seed=0, held_out={}, config={})
    split, codec = Store.open(tmp_path).split("test"), Palette(palette_VC)
    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), 5, 4, "float32")
    params = random_parameters(model)
    tokens = codec.encode(images).astype(np.int32)
    nats_ET = np.asarray(objectives.nats_per_token(jax.jit(model.logits)(params, tokens), tokens), np.float64)

    found = loss_maps.measure(model, params, split, sharding.make_mesh(MeshConfig()), 7, codec, shown=9)
    np.testing.assert_allclose(found.by_position_T, nats_ET.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.shown_NT, nats_ET[:9], rtol=1e-4, atol=1e-5)
    for label, (nats, count) in found.by_class.items():
        np.testing.assert_allclose(nats, nats_ET[labels == label].mean(), rtol=1e-6)
        assert count == (labels == label).sum()
    assert list(found.by_class) == [0, 1, 2]


@pytest.fixture
def run_evaluate(tmp_path, monkeypatch):
    """Runs the job on some of the runs `a` and `b`; returns the pictures and numbers of them that its workdir holds."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(ROOT / "tests" / "data" / "pretrain_format2", name)

    def run(checkpoints, **keys):
        given = {"checkpoints": checkpoints, "data": {"store": str(ROOT / "tests" / "data" / "store_format2")}, **keys}
        evaluate.run(parse("evaluate", given), "evaluate")
        return sorted(f"{file.parent.name}/{file.name}" for file in (tmp_path / "evaluate").glob("*/*"))

    return run


def test_pictures_of_other_settings_are_removed(run_evaluate, tmp_path):
    """Charts, loss maps and samples; those of known rows stay. Seen to fail with each of them kept."""
    keys = {"limit": 4, "loss_maps": 1, "samples": 1}
    both = run_evaluate("a,b", **keys)
    assert len(both) == 1 + 2 * (3 + 1) and "figures/loss.png" in both and run_evaluate("b", **keys) == both
    (tmp_path / "evaluate" / "figures" / "accuracy_by_layer.png").touch()  # with probe=True
    samples = f"samples/{evaluate._samples_name('b/checkpoints/30', 30)}.npz"
    assert run_evaluate("a", loss_maps=1) == [
        "figures/surprise-a-30.png", "figures/surprise_means-a-30.png", "surprise/a-30.json"]
    assert run_evaluate("b", samples=1) == [samples] and samples in both


@pytest.mark.parametrize("key", evaluate.CAUSAL)
def test_models_that_are_not_autoregressive_are_refused_first(run_evaluate, monkeypatch, key):
    """Before any checkpoint is loaded. Seen to fail with a check of loaded models."""
    def load(step, load=checkpoint.load_metadata):
        found = load(step)
        masked = dataclasses.replace(found.config, objective="masked")
        return dataclasses.replace(found, config=masked) if step.startswith("b/") else found

    monkeypatch.setattr(checkpoint, "load_metadata", load)
    monkeypatch.setattr(evaluate, "_loaded", lambda *_: pytest.fail("a checkpoint is loaded"))
    with pytest.raises(UserError, match=f"^{key}=1: b/.* objective=masked, .* not autoregressive. Set {key}=0.$"):
        run_evaluate("a,b", **{key: 1})


COLORS = Palette(np.zeros((5, 3), np.float32))
TOKENS = {
    "labels": (np.zeros((3, 10), np.float32), "float32"),
    "another size": (np.zeros((3, 64), np.int64), r"\[3, 64\]"),
    "archive": (None, "an archive"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_other_files_than_tokens_are_refused(tmp_path, case):
    """The error says what the file holds. Seen to fail with the check of the width left out."""
    array, message = TOKENS[case]
    path = tmp_path / "teX.npy"
    with path.open("wb") as file:
        np.savez(file, a=1) if array is None else np.save(file, array)
    with pytest.raises(UserError, match=message):
        TokenFile(str(path), 4, COLORS)


def test_a_file_of_tokens_in_openais_layout(tmp_path):
    """int64 [n, T] as published: every row counts once, and a token outside the palette is an error that names its row.

    Seen to fail with the check of the tokens left out, and with the rows read in another order.
    """
    tokens = np.random.default_rng(0).integers(0, 5, (11, 16))
    np.save(tmp_path / "imagenet_teX.npy", tokens)
    file = TokenFile(str(tmp_path / "imagenet_teX.npy"), 4, COLORS)
    np.testing.assert_array_equal(file.tokens(np.array([3, 10, 0])), tokens[[3, 10, 0]])
    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), 5, 4, "float32")
    params = random_parameters(model)
    expected = float(objectives.nats_per_token(jax.jit(model.logits)(params, tokens), tokens).mean())
    measure = exact_loss.make_measure(model, sharding.make_mesh(MeshConfig()), 8, COLORS)
    assert measure(params, file) == {"nats_per_pixel": pytest.approx(expected, rel=1e-6)}
    tokens[7, 2] = 5
    np.save(tmp_path / "imagenet_teX.npy", tokens)
    with pytest.raises(UserError, match="row 7 has a token outside 0..4"):
        measure(params, TokenFile(str(tmp_path / "imagenet_teX.npy"), 4, COLORS))
