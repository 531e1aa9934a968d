"""Exact evaluation over a whole split, in process."""

import jax
import numpy as np
import pytest
from test_model import random_parameters

from igpt_jax import evaluation, objectives, palette, sharding, storage
from igpt_jax.config import MeshConfig, ModelConfig
from igpt_jax.data.store import Store, Writer
from igpt_jax.model import Model


def test_every_image_counts_once(tmp_path, monkeypatch):
    """23 images in batches of 1, 8 and 64 against the mean over all at once; given up, there is no figure.

    Must fail with the last batch dropped, and with its filled-up rows counted in.
    """
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    palette_VC = rng.uniform(-1, 1, (5, 3)).astype(np.float32)
    writer = Writer(storage.path(tmp_path), 4)
    images = rng.integers(0, 256, (23, 4, 4, 3), np.uint8)
    writer.add("test", images, None)
    writer.finish(palette_VC, source="", resize="", seed=0, held_out={}, config={})
    split, table = Store.open(tmp_path).split("test"), palette.lookup_table(palette_VC)

    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), 5, 4, "float32")
    params, mesh = random_parameters(model), sharding.make_mesh(MeshConfig())
    tokens = palette.encode(images, table).astype(np.int32)
    expected = float(objectives.nats_per_token(jax.jit(model.logits)(params, tokens), tokens).mean())
    for batch_size in (1, 8, 64):
        evaluate = evaluation.make_evaluate(model, mesh, batch_size, table)
        assert evaluate(params, split) == pytest.approx(expected, rel=1e-6)
    assert evaluate(params, split, lambda: True) is None
