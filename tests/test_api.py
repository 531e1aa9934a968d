"""The Python interface computes what the jobs compute; images of every kind; mistakes; the guide's examples."""

import doctest
import json
import re
import textwrap

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_convert import make_folder
from test_model import numpy_logits, random_parameters

import igpt_jax
from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import MeshConfig, ProbingConfig, SampleConfig, parse
from igpt_jax.config.data import ProbeDataConfig
from igpt_jax.data import palette
from igpt_jax.data.store import Writer
from igpt_jax.evaluation import linear_probe, probing
from igpt_jax.jobs import sample
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.weights import ours

GRAYS_VC = np.linspace(-1, 1, 17, dtype=np.float32)[:, None].repeat(3, 1)
CONFIG = {"name": "igpt_tiny", "layers": 4, "embed": 64, "heads": 4}


def make_run(workdir, steps, config, classes=0):
    """A checkpoint with random weights of 8x8 pixels and 17 grays. Returns its parameters."""
    model = Model.of(config, 17, 8, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), classes, "float32")
    params = jax.tree.map(np.asarray, random_parameters(model, seed=steps))
    ours.save(str(workdir), params, Metadata(config, GRAYS_VC, 8, "", steps, classes=classes))
    return params


def make_probe(workdir, layer, identity, D=64, classes=10):
    rng = np.random.default_rng(layer)
    probe = linear_probe.Probe(rng.normal(size=D), rng.uniform(1, 2, D), rng.normal(size=(D, classes)),
                               rng.normal(size=classes))
    probing.save_probe(workdir / probing.PROBE, probing.SavedProbe(probe, layer, "normalized", identity))
    return probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of pretrain (two steps), finetune, probe and a masked run, with random weights; pictures; Hugging Face's."""
    folder = tmp_path_factory.mktemp("api")
    pretrained = parse("pretrain", {"job": "pretrain", "model": CONFIG})
    for steps in (250, 500):
        make_run(folder / "runs/pretrain", steps, pretrained)
    make_run(folder / "runs/finetune", 300, parse("finetune", {"job": "finetune", "model": CONFIG}), classes=10)
    make_run(folder / "runs/masked", 5, parse("pretrain", {"job": "pretrain", "model": CONFIG, "objective": "masked"}))
    make_probe(folder / "runs/probe", 3, checkpoint.identity(f"{folder}/runs/pretrain"))
    for seed, name in enumerate(("digit.png", "another.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    make_folder(folder / "models/imagegpt-small")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return igpt_jax.load(folder / "runs/pretrain")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


def tokens_of(images):
    return palette.encode(images, palette.lookup_table(GRAYS_VC)).astype(np.int32)


def test_importing_the_package_is_free(python):
    """Neither NumPy nor JAX."""
    python("import sys, igpt_jax; assert igpt_jax.__version__ and not {'numpy', 'jax', 'absl'} & set(sys.modules);"
           "assert igpt_jax.UserError and 'jax' not in sys.modules; assert callable(igpt_jax.load)", devices=1)


def test_the_guides_examples_run(folder, monkeypatch):
    """docs/python.md. Seen to fail with another line for the model."""
    monkeypatch.chdir(folder)
    failed, tried = doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False,
                                     optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 15 and not failed


def test_the_readmes_example_runs(folder, monkeypatch):
    """With the shapes that its comments state. Seen to fail with another n."""
    monkeypatch.chdir(folder)
    example = re.search(r"(    import igpt_jax\n(?:    .*\n)+)", (ROOT / "README.md").read_text())[1]
    names = {}
    exec(textwrap.dedent(example).replace("runs/quickstart/", "runs/"), names)
    shapes = [list(names[name].shape) for name in ("images", "features", "completions")]
    stated = [json.loads(shape) for shape in re.findall(r"#.*? (\[.*?\])", example)]
    assert shapes == stated


def test_images_of_every_kind_are_the_same(model, images, tmp_path):
    """Arrays, Pillow's images and files, each twice as large and wider than high, equal the small arrays.
    """
    expected = model.features(images)
    large = np.pad(images.repeat(2, 1).repeat(2, 2), ((0, 0), (0, 0), (3, 3), (0, 0)))
    for number, pixels in enumerate(large):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.iterdir())
    for given in (large, list(large), [Image.fromarray(pixels) for pixels in large], paths, list(map(str, paths))):
        np.testing.assert_array_equal(model.features(given), expected)
    for one in (images[0], paths[0], str(paths[0]), Image.fromarray(large[0])):
        np.testing.assert_allclose(model.features(one), expected[:1], rtol=1e-5)


def test_losses_are_those_of_the_formulas(folder, model, images):
    """Against a NumPy forward pass."""
    params = make_run(folder / "again", 500, model.metadata.config)
    logits_NTV, tokens_NT = numpy_logits(params, tokens_of(images), 4), tokens_of(images)
    chosen_NT = np.take_along_axis(logits_NTV, tokens_NT[..., None], -1)[..., 0]
    nats_NT = np.log(np.exp(logits_NTV).sum(-1)) - chosen_NT
    np.testing.assert_allclose(model.nats(images, per_pixel=True), nats_NT.reshape(5, 8, 8), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.nats(images), nats_NT.mean(1), rtol=1e-5)


def test_drawings_are_those_of_the_sample_job(folder, model):
    """The same seed draws the same images, in other batches and row by row; rows still to come are gray.
    """
    settings = {"temperature": 0.7, "seed": 3, "top_k": 9}
    sample.run(SampleConfig(checkpoint=f"{folder}/runs/pretrain", images=f"{folder}/*.png", rows=3, completions=3,
                            count=5, **settings), str(folder / "sample"))
    with np.load(folder / "sample/samples.npz") as drawn:
        samples, completions = (palette.decode(drawn[name], drawn["palette"]) for name in ("samples", "completions"))
    np.testing.assert_array_equal(model.sample(5, **settings), samples.reshape(5, 8, 8, 3))
    pictures = [folder / "another.png", folder / "digit.png"]
    completed = model.complete(pictures, rows=3, n=3, **settings)
    np.testing.assert_array_equal(completed, completions.reshape(2, 3, 8, 8, 3))
    for done, images in enumerate(model.complete_by_row(pictures, rows=3, n=3, **settings), start=4):
        np.testing.assert_array_equal(images[:, :, :done], completed[:, :, :done])
        assert (images[:, :, done:] == 127).all()
    assert done == 8
    alone = list(model.complete_by_row(pictures[0], rows=7, **settings))
    np.testing.assert_array_equal(alone[-1][0], model.complete(pictures[0], rows=7, **settings)[0])


def test_a_second_call_compiles_nothing(model, images):
    """Neither do other numbers of images that are padded to the same batch, nor another temperature or seed.
    """
    compiled = []

    def calls(count, temperature):
        for call in (model.features, model.nats, lambda x: model.nats(x, per_pixel=True), model.classify,
                     lambda x: model.sample(len(x), temperature=temperature, seed=count),
                     lambda x: model.complete(x, rows=4, temperature=temperature),
                     lambda x: list(model.complete_by_row(x, rows=count, temperature=temperature))):
            call(images[:count])

    calls(4, 1.0)
    def listen(name, *_, **__):
        compiled.extend([name] if "backend_compile" in name else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        calls(3, 0.5)
        assert not compiled
        calls(5, 0.5)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_features_of_hugging_faces_weights(tmp_path):
    """They are those that the probe job computes of the converted checkpoint, and those of transformers' own model.
    """
    import torch
    from weights_files import make_huggingface, run

    theirs = make_huggingface(tmp_path / "hf", "small", 0)
    model = igpt_jax.load(f"huggingface:{tmp_path}/hf")
    images = np.random.default_rng(1).integers(0, 256, (20, 5, 5, 3), np.uint8)
    found = model.features(images, layer="all")

    run(tmp_path / "converted", f"huggingface:{tmp_path}/hf", "")
    writer = Writer(storage.path(tmp_path / "store"), 5)
    for name in ("train", "held_out", "test"):
        writer.add(name, images, (np.arange(20) % 2).astype(np.int32))
    writer.finish(model.metadata.palette_VC, source="", resize="", seed=0, held_out={}, config={})
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    trained, params, metadata = checkpoint.load_model(str(tmp_path / "converted"), mesh, "float32")
    prober = probing.Prober(ProbingConfig(data=ProbeDataConfig(store=str(tmp_path / "store"))), metadata)
    np.testing.assert_allclose(found, prober.features(trained, params, mesh, 16, "")[0], rtol=1e-5, atol=1e-6)

    tokens_NT = palette.encode(images, palette.lookup_table(model.metadata.palette_VC)).astype(np.int64)
    inputs_NT = torch.from_numpy(np.insert(tokens_NT[:, :-1], 0, 13, axis=1))
    with torch.inference_mode():
        streams = theirs.transformer(inputs_NT, output_hidden_states=True).hidden_states
        normed = [block.ln_1(x) for block, x in zip(theirs.transformer.h, streams, strict=False)] + [streams[-1]]
    np.testing.assert_allclose(found, torch.stack(normed, 1).mean(2).numpy(), rtol=1e-4, atol=1e-5)


def test_openais_weights_come_with_a_palette_of_the_user(tmp_path):
    """They give what their converted checkpoint gives."""
    from weights_files import make_openai, make_palette, run

    make_openai(tmp_path / "model.ckpt-131000", "small", 0)
    given, file = f"openai:{tmp_path}/model.ckpt-131000", make_palette(tmp_path / "palette.npy", 13)
    with pytest.raises(igpt_jax.UserError, match="without its palette. Set palette to its .npy"):
        igpt_jax.load(given)
    run(tmp_path / "converted", given, "", palette=file)
    images = np.random.default_rng(1).integers(0, 256, (3, 5, 5, 3), np.uint8)
    ours, theirs = igpt_jax.load(tmp_path / "converted"), igpt_jax.load(given, palette=file)
    np.testing.assert_array_equal(ours.nats(images, per_pixel=True), theirs.nats(images, per_pixel=True))


def test_a_damaged_probe_is_one_line(tmp_path):
    """So that `load` can pass over it. Seen to fail with the error of zlib."""
    np.savez_compressed(tmp_path / probing.PROBE, mean_D=np.zeros(99))
    content = bytearray((tmp_path / probing.PROBE).read_bytes())
    start = 30 + sum(int.from_bytes(content[at:at + 2], "little") for at in (26, 28))  # of the compressed bytes
    content[start:start + 4] = b"\xff" * 4
    (tmp_path / probing.PROBE).write_bytes(content)
    with pytest.raises(igpt_jax.UserError, match="is not a probe written by the probe job"):
        probing.load_probe(str(tmp_path))


def test_the_best_layer_and_the_classes_come_from_the_probe_of_this_step(folder, model, images, tmp_path):
    """A probe beside the run counts for the step that it was fit on, and no other.
    """
    assert model.best_layer == 3
    np.testing.assert_array_equal(model.features(images), model.features(images, layer="all")[:, 3])
    np.testing.assert_array_equal(model.features(images, layer=-1), model.features(images, layer="all")[:, 4])
    probe = probing.load_probe(str(folder / "runs/probe")).probe
    np.testing.assert_array_equal(model.classify(images), probe.predict(model.features(images, layer=3)))
    np.testing.assert_allclose(model.probabilities(images).sum(1), 1, rtol=1e-5)
    # Its classes are those of the store that it was fit on, which need not be the one of the pretraining.
    named = probing.load_probe(str(folder / "runs/probe"))._replace(class_names=tuple("abcdefghij"))
    probing.save_probe(storage.path(tmp_path / "probe.npz"), named)
    assert igpt_jax.load(folder / "runs/pretrain", probe=tmp_path).class_names == tuple("abcdefghij")

    earlier = igpt_jax.load(folder / "runs/pretrain", step=250)
    assert earlier.probe is None and earlier.best_layer == 2 and earlier.class_names == ()
    with pytest.raises(igpt_jax.UserError, match="no class head, and no probe"):
        earlier.classify(images)
    with pytest.raises(igpt_jax.UserError, match="probe of another checkpoint"):
        igpt_jax.load(folder / "runs/pretrain/checkpoints/250", probe=folder / "runs/probe")
    make_probe(tmp_path, 1, "")  # as an older version wrote it
    assert igpt_jax.load(folder / "runs/pretrain", step=250, probe=tmp_path).best_layer == 1


def test_a_class_head_gives_probabilities(folder, images):
    """Against softmax of the head's logits on the last layer's features."""
    model = igpt_jax.load(folder / "runs/finetune")
    params = make_run(folder / "head", 300, model.metadata.config, classes=10)
    logits_NK = model.features(images, layer=4) @ params["class_head_KD"].T
    odds_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    np.testing.assert_allclose(model.probabilities(images), odds_NK / odds_NK.sum(1, keepdims=True), rtol=1e-4,
                               atol=1e-6)
    assert model.classify(images).tolist() == logits_NK.argmax(1).tolist()


def test_a_mesh_changes_no_result(folder, python):
    """Features, losses and classes in float64 on eight devices against one, to 1e-8; the same drawings.
    """
    python("api_meshes.py", folder)


@pytest.mark.parametrize("call, message", [
    (lambda model, folder: igpt_jax.load(folder / "none"), "holds no checkpoint"),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", step=7), "step=7: .*has the steps 250, 500"),
    (lambda model, folder: igpt_jax.load("huggingface:none", step=7), "is not a workdir with steps"),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", device="tpu"), "device='tpu'"),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", device="cpu", mesh={}), "both given"),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", mesh={"model": 2}), "mesh axes to sizes. Axes: "),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", precision="float16"), "precision='float16'"),
    (lambda model, folder: igpt_jax.load(folder / "runs/pretrain", probe=folder / "none"), "none/probe.npz"),
    (lambda model, folder: model.features(np.zeros((2, 8, 8, 3))), "image 0: an array of float64"),
    (lambda model, folder: model.features(np.zeros((2, 8, 8), np.uint8)), r"an array of uint8 \[2, 8, 8\]"),
    (lambda model, folder: model.features(np.zeros((2, 7, 9, 3), np.uint8)), "9x7: smaller than 8 pixels"),
    (lambda model, folder: model.features([folder / "digit.png", folder / "none.png"]), "image 1 .*none.png.: cannot"),
    (lambda model, folder: model.features([]), "no images are given"),
    (lambda model, folder: model.features(folder / "digit.png", layer=5), "layer=5 must be"),
    (lambda model, folder: model.features(folder / "digit.png", layer="last"), "layer='last' must be"),
    (lambda model, folder: model.features(folder / "digit.png", kind="Normalized"), "kind='Normalized'"),
    (lambda model, folder: model.sample(0), "n=0 must be at least 1"),
    (lambda model, folder: model.sample(1, temperature=-1), "temperature=-1 must not be negative"),
    (lambda model, folder: model.sample(1, top_p=0), "top_p=0 must lie in"),
    (lambda model, folder: model.complete(folder / "digit.png", rows=9), "rows=9: the images have 8 rows"),
    (lambda model, folder: igpt_jax.load(folder / "runs/masked").sample(1), "masked, which is not autoregressive"),
    (lambda model, folder: igpt_jax.load(folder / "runs/masked").nats(folder / "digit.png", per_pixel=True),
     "only an autoregressive model"),
])
def test_mistakes_are_one_line(folder, model, call, message):
    """Each is a UserError."""
    with pytest.raises(igpt_jax.UserError, match=message) as caught:
        call(model, folder)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_of_jaxs_settings_is_changed(folder, images):
    """Seen to fail with 64-bit types left on, which loading sets for Orbax's threads."""
    before = {name: jax.config.values[name] for name in ("jax_enable_x64", "jax_default_matmul_precision")}
    model = igpt_jax.load(folder / "runs/pretrain", precision="float64")
    assert model.features(images).dtype == np.float32 and model.nats(images).dtype == np.float64
    assert before == {name: jax.config.values[name] for name in before}
