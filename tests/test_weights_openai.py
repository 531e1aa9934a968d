"""OpenAI's format: bit-identical round trips of checkpoints written by TensorFlow under the released names."""

import jax
import numpy as np
import pytest
from weights_files import SIZES, float32, make_openai, make_palette, run  # noqa: F401 (float32 is a fixture)

from igpt_jax import checkpoint
from igpt_jax.config import EvaluateConfig
from igpt_jax.jobs import evaluate
from igpt_jax.model import objectives
from igpt_jax.weights import certificate, open_weights


@pytest.mark.parametrize("size", SIZES)
def test_openai_to_ours_and_back_is_bit_identical(tmp_path, size):
    """Also from OpenAI to transformers, with the released code's logits. Our checkpoint has a checksum for each array.

    Seen to fail with c_proj's dims as H N D, and with metadata without checksums.
    """
    import tensorflow as tf
    import transformers  # noqa: F401, which the certificate calls

    arrays = make_openai(tmp_path / "oa" / "model.ckpt-131000", size, 0)
    palette = make_palette(tmp_path / "palette.npy", SIZES[size]["colors"])
    _, there = run(tmp_path / "a", f"openai:{tmp_path}/oa", "", palette=palette)
    sums = checkpoint.load_metadata(str(tmp_path / "a/checkpoints/131000")).checksums
    assert len(sums) == len(there["tensors"]["target"])
    _, back = run(tmp_path / "b", f"orbax:{tmp_path}/a", f"openai:{tmp_path}/back/model.ckpt-1")
    _, across = run(tmp_path / "c", f"openai:{tmp_path}/oa", f"huggingface:{tmp_path}/hf", palette=palette)
    reader = tf.train.load_checkpoint(str(tmp_path / "back/model.ckpt-1"))
    assert set(reader.get_variable_to_shape_map()) == set(arrays)
    for name, array in arrays.items():
        assert reader.get_tensor(name).tobytes() == array.tobytes(), name
    for record in (there, back, across):
        assert record["verdict"] == "same" and record["logits"]["max_difference"] < 1e-4
        assert record["parameters"] == sum(array.size for array in arrays.values())


def test_masked_models_come_back_bit_identical_and_serve_evaluate(tmp_path):
    """OpenAI's BERT variables there and back; `evaluate` gives the released code's nats per hidden pixel, 1e-5.

    Seen to fail with the released code causal or shown hidden colors, with nats of all pixels, and with metadata that
    says autoregressive.
    """
    import tensorflow as tf

    s = SIZES["wide"]
    arrays = make_openai(tmp_path / "bert" / "model.ckpt-131000", "wide", 0, start=False)
    palette = make_palette(tmp_path / "palette.npy", s["colors"])
    _, there = run(tmp_path / "a", f"openai:{tmp_path}/bert", "", palette=palette)
    _, back = run(tmp_path / "b", f"orbax:{tmp_path}/a", f"openai:{tmp_path}/back/model.ckpt-1")
    reader = tf.train.load_checkpoint(str(tmp_path / "back/model.ckpt-1"))
    assert set(reader.get_variable_to_shape_map()) == set(arrays)
    assert all(reader.get_tensor(name).tobytes() == array.tobytes() for name, array in arrays.items())
    for record in (there, back):
        nats = record["logits"]["nats_per_pixel"]
        assert record["verdict"] == "same" and record["logits"]["max_difference"] < 1e-4
        assert abs(nats["source"] - nats["target"]) < 1e-5

    record = checkpoint.load_metadata(f"{tmp_path}/a")
    assert record.config.objective == "masked" and record.config.mask_ratio == 0.15
    tokens_BT = np.random.default_rng(0).integers(s["colors"], size=(6, s["side"] ** 2))
    np.save(tmp_path / "tokens.npy", tokens_BT)
    measured = evaluate.run(EvaluateConfig(checkpoints=f"{tmp_path}/a", tokens=f"{tmp_path}/tokens.npy", batch_size=4),
                            str(tmp_path / "e"))
    keys_B = objectives.example_keys(jax.random.fold_in(jax.random.key(0), 0), np.arange(6))
    hidden_BT = np.asarray(objectives.Masked(0.15).view(tokens_BT, keys_B, 16).hidden_BT)
    logits_BTV = open_weights("openai", f"{tmp_path}/bert").outputs(tokens_BT, hidden_BT)["pixels"]
    nats, = measured["nats_per_pixel"].values()
    assert nats == pytest.approx(certificate.nats_per_pixel(logits_BTV, tokens_BT, hidden_BT), abs=1e-5)
