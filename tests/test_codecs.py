"""Codecs: pixels to tokens and back, models of several channels, and jobs that read their checkpoints."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_decode import keys_for, uncached
from test_model import numpy_logits, random_parameters

import igpt_jax
from igpt_jax import checkpoint
from igpt_jax.config import CODECS, ModelConfig, UserError, base_config, override, parse
from igpt_jax.data.codecs import codec_of
from igpt_jax.model.dims import Dims, count_parameters
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate
from igpt_jax.training import transfer

GRAYS_VC = np.linspace(-1, 1, 9, dtype=np.float32)[:, None].repeat(3, axis=1)
TINY = {"model.name": "igpt_tiny", "model.layers": 2, "model.embed": 16, "model.heads": 2, "batch_size": 16,
        "precision": "float32", "optimizer.warmup_steps": 2, "steps": 6}


def random_images(count=3, size=4):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_rgb_tokens_are_the_bytes_in_raster_order():
    """The channels of a pixel follow each other, and decoding gives the image back. Seen to fail with the image's
    channels one after the other (C Y X)."""
    images, rgb = random_images(), codec_of("rgb", None)
    tokens_BT = rgb.encode(images)
    assert tokens_BT.shape == (3, 48) and tokens_BT[1, 3 * 6 + 2] == images[1, 1, 2, 2]
    np.testing.assert_array_equal(rgb.decode(tokens_BT.astype(np.int32)), images)


@pytest.mark.slow
def test_every_color_survives_rgb_and_grey_levels_survive_grey():
    """All 2^24 colors; and luma as Pillow computes it for each of them."""
    colors = np.arange(2**24, dtype=np.uint32)
    images = np.stack([colors >> 16, colors >> 8, colors], axis=-1).astype(np.uint8).reshape(1, 4096, 4096, 3)
    rgb, grey = (codec_of(name, None) for name in ("rgb", "grey"))
    np.testing.assert_array_equal(rgb.decode(rgb.encode(images)), images)
    luma = np.asarray(Image.fromarray(images[0]).convert("L"))
    np.testing.assert_array_equal(grey.encode(images).reshape(4096, 4096), luma)


def test_grey_tokens_are_pillows_luma():
    """Grey pixels are exact, and decoding gives three equal channels. Seen to fail without the rounding term."""
    images, grey = random_images(50), codec_of("grey", None)
    luma = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    np.testing.assert_array_equal(grey.encode(images), luma.reshape(50, -1))
    np.testing.assert_array_equal(grey.decode(luma.reshape(50, -1)), luma[..., None].repeat(3, axis=-1))
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(grey.decode(grey.encode(levels)), levels)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_agree_on_shapes_and_black(name):
    codec = codec_of(name, GRAYS_VC)
    tokens_BT = codec.encode(random_images())
    assert tokens_BT.shape == (3, 16 * codec.channels) and tokens_BT.dtype == codec.dtype
    assert tokens_BT.max() < codec.vocabulary and codec.black == 0 and codec.decode(tokens_BT).shape == (3, 4, 4, 3)


def rgb_model(positions, image_size=3, **settings):
    config = ModelConfig("igpt_tiny", layers=3, embed=24, heads=2, positions=positions, **settings)
    return Model(config, vocabulary=256, image_size=image_size, precision="float32", channels=3)


def learned_from_factored(params):
    """The same model with one embedding per position."""
    row_YD, column_XD, channel_CD = (np.asarray(params[name]) for name in
                                     ("row_embed_YD", "column_embed_XD", "channel_embed_CD"))
    table_TD = [row + column + channel for row in row_YD for column in column_XD for channel in channel_CD]
    return {**params, "position_embed_TD": np.stack(table_TD)}


@pytest.mark.parametrize("positions", ["learned", "factored"])
def test_logits_of_an_rgb_model_equal_a_numpy_forward(positions):
    """27 tokens of 3x3 pixels, three layers. Seen to fail with rows and columns exchanged, and with the channel as the
    slowest dim."""
    model = rgb_model(positions)
    params = random_parameters(model)
    tokens_BT = np.random.default_rng(1).integers(0, 256, (2, 27))
    expected = numpy_logits(learned_from_factored(params) if positions == "factored" else params, tokens_BT, heads=2)
    np.testing.assert_allclose(model.logits(params, tokens_BT), expected, atol=1e-4)
    assert count_parameters(params) == model.dims.parameter_count


@pytest.mark.parametrize("positions", ["learned", "factored"])
def test_cached_equals_uncached_token_for_token(positions):
    """From nothing, from a row, and from inside a pixel. Seen to fail with the channel of a position taken from its
    pixel."""
    model = rgb_model(positions)
    params, run = random_parameters(model), jax.jit(generate, static_argnums=(0, 4))
    for given in (0, 9, 13):
        given_BP = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, given)), jnp.int32)
        tokens_BT = run(model, params, given_BP, keys_for(2), Sampling())
        np.testing.assert_array_equal(tokens_BT, uncached(model, params, given_BP, keys_for(2), Sampling()))


def test_initial_positions_are_as_wide_in_either_form():
    """The sum of three tables deviates as one table does. Seen to fail without the root of 3."""
    for positions in ("learned", "factored"):
        params = rgb_model(positions, image_size=32).init(jax.random.key(0))
        table_TD = learned_from_factored(params)["position_embed_TD"] if positions == "factored" else (
            params["position_embed_TD"])
        assert np.std(table_TD) == pytest.approx(0.01, rel=0.1)


def test_positions_of_another_size_keep_their_channels():
    """Each channel's plane is resized by itself. Seen to fail with the channels read as columns."""
    dims = Dims(L=1, D=2, N=1, H=2, F=8, V=256, T=8 * 8 * 3, C=3)
    planes = np.arange(3.) * 100 + np.arange(4.)[:, None, None] + np.zeros((4, 4, 3))
    table_TD = jnp.asarray(planes.reshape(-1, 1).repeat(2, axis=1), jnp.float32)
    grown = np.asarray(transfer.resized("position_embed_TD", table_TD, dims)).reshape(8, 8, 3, 2)
    np.testing.assert_allclose(grown[3, 3, :, 0], grown[3, 3, 0, 0] + [0, 100, 200], rtol=1e-5)
    np.testing.assert_allclose(grown[1:7, 4, 1, 0], 100 + np.arange(1, 7) / 2 - 0.25, rtol=1e-5)
    rows_YD = jnp.arange(8.).reshape(4, 2)
    assert transfer.resized("row_embed_YD", rows_YD, dims).shape == (8, 2)
    np.testing.assert_array_equal(transfer.resized("channel_embed_CD", rows_YD[:3], dims), rows_YD[:3])


def run(name, workdir, config):
    """A job in this process: keys as on the command line. Returns its metrics."""
    settings = override(base_config(name), ",".join(f"{key}={value}" for key, value in config.items()))
    return importlib.import_module(f"igpt_jax.jobs.{name}").run(parse(name, settings), str(workdir))


@pytest.fixture(scope="module")
def runs(folder, store):
    """A run of each codec other than a palette, on the digits' store; rgb has factored positions."""
    for name, more in (("rgb", {"model.positions": "factored", "data.augment": "shift"}), ("grey", {})):
        metrics = run("pretrain", folder / name, {**TINY, "data.store": str(store), "codec": name, **more})
        (folder / name / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_first_loss_is_that_of_uniform_guessing(runs):
    """The head starts at zero: 8 bits per dimension, to float32's rounding (2e-6 seen, relative: machines sum in other
    orders). Nats per pixel are of all channels.

    Seen to fail with the mean over channels for the sum, and with ln 2 for 3 ln 2.
    """
    for name, channels in (("rgb", 3), ("grey", 1)):
        first = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["train/bits_per_dim"] == pytest.approx(8, rel=1e-5)
        assert first["train/nats_per_pixel"] == pytest.approx(8 * channels * math.log(2), rel=1e-5)
        metrics = json.loads((runs / name / "metrics.json").read_text())
        assert metrics["eval/bits_per_dim"] == pytest.approx(metrics["eval/nats_per_pixel"] / channels / math.log(2))
        assert metrics["eval/bits_per_dim"] < 7.99


def test_jobs_read_checkpoints_of_other_codecs(runs):
    """evaluate with loss maps and samples, sample, probe, finetune and report; a completion keeps the rows given.

    Seen to fail with the given rows counted in pixels.
    """
    held_out = {"data.split": "held_out"}
    run("evaluate", runs / "evaluate", {"checkpoints": f"{runs}/[rg]*", "samples": 2, "loss_maps": 2, **held_out})
    rows = {CODECS[row["checkpoint"].split("/")[-3]]: row
            for row in json.loads((runs / "evaluate" / "evaluation.json").read_text())}
    for channels, row in rows.items():
        assert row["bits_per_dim"] == pytest.approx(row["nats_per_pixel"] / channels / math.log(2))
    assert sorted(rows) == [1, 3]
    maps = [json.loads(file.read_text()) for file in sorted((runs / "evaluate" / "surprise").glob("*.json"))]
    grey, rgb = sorted(maps, key=lambda each: "nats_by_channel" in each)
    assert "nats_by_channel" not in grey and len(rgb["nats_by_channel"]) == 3
    assert sum(rgb["nats_by_channel"]) == pytest.approx(rows[3]["nats_per_pixel"], rel=1e-5)
    by_class = [(each["nats_per_pixel"], each["examples"]) for each in rgb["nats_by_class"].values()]
    of_class, examples = zip(*by_class, strict=True)
    assert np.average(of_class, weights=examples) == pytest.approx(rows[3]["nats_per_pixel"], rel=1e-5)

    checkpoint_of_rgb = {"checkpoint": f"{runs}/rgb"}
    run("sample", runs / "sample", {**checkpoint_of_rgb, "count": 2, "examples": 2, **held_out})
    with np.load(runs / "sample" / "samples.npz") as made:
        given = 4 * 8 * 3
        assert made["samples"].shape == (2, 64 * 3) and str(made["codec"]) == "rgb"
        np.testing.assert_array_equal(made["completions"][:, 0, :given], made["originals"][:, :given])
        assert (made["completions"][:, 0, given:] != made["originals"][:, given:]).any()
    run("probe", runs / "probe", {**checkpoint_of_rgb, "data.test": "held_out", "layers": "(1,)", "baselines": False})
    run("finetune", runs / "finetune", {**checkpoint_of_rgb, "steps": 2, "batch_size": 16, "precision": "float32",
                                        "data.test": ""})
    assert checkpoint.load_metadata(f"{runs}/finetune").config.codec == "rgb"
    run("report", runs / "report", {"workdirs": f"{runs}/*"})


def test_the_python_interface_of_an_rgb_model(runs):
    """Loss maps sum over channels, rows appear one by one as `complete` draws them, and the model says its codec.

    Seen to fail with rows of pixels where rows of tokens were meant.
    """
    model = igpt_jax.load(runs / "rgb")
    images = random_images(2, 8)
    np.testing.assert_array_equal(model.quantize(images), images)
    nats_NYX = model.nats(images, per_pixel=True)
    np.testing.assert_allclose(nats_NYX.mean(axis=(1, 2)), model.nats(images), rtol=1e-6)
    assert nats_NYX.shape == (2, 8, 8) and 3 < nats_NYX.mean() < 3 * math.log(256) * 1.1
    *_, last = model.complete_by_row(images, rows=5)
    np.testing.assert_array_equal(last, model.complete(images, rows=5))
    np.testing.assert_array_equal(last[:, 0, :5], images[:, :5])
    assert "256 levels of rgb" in repr(model) and model.guessing == pytest.approx(3 * math.log(256))


@pytest.mark.parametrize(("job", "config", "said"), [
    ("pretrain", {**TINY, "codec": "grey", "model.positions": "factored"}, r"codec='grey' \(checkpoint: 'rgb'\)"),
    ("pretrain", {**TINY, "codec": "rgb"}, "model.positions='learned'"),
    ("pretrain", {**TINY, "codec": "rgb", "palette": "p.npy"}, "has no effect on codec=rgb"),
    ("pretrain", {**TINY, "codec": "rbg"}, "codec"),
    ("finetune", {"checkpoint": "rgb", "codec": "grey"}, "codec=grey: the checkpoint brings its own"),
    ("convert", {"convert_from": "orbax:rgb", "convert_to": "huggingface:hf"}, "palettes and learned positions only")])
def test_contradictions_are_refused(runs, store, monkeypatch, job, config, said):
    """In one line that names the key."""
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=said) as error:
        run(job, "rgb" if job == "pretrain" else "new", {**config, **({"data.store": str(store)} if job == "pretrain"
                                                                     else {})})
    assert len(str(error.value).splitlines()) == 1
