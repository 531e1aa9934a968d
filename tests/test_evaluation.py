"""Exact loss over a whole split, and files of tokens, in this process."""

import jax
import numpy as np
import pytest
from test_model import random_parameters

from igpt_jax import storage
from igpt_jax.config import MeshConfig, ModelConfig, UserError
from igpt_jax.data.codecs import Palette
from igpt_jax.data.store import Store, Writer
from igpt_jax.data.token_file import TokenFile
from igpt_jax.evaluation import exact_loss
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
