"""The certificate of converted weights, exported programs, refused arguments, memory of a conversion."""

import json
import math
import types

import jax
import numpy as np
import pytest
from weights_files import (  # noqa: F401 (float32 is a fixture for all tests)
    SIZES,
    float32,
    make_huggingface,
    make_openai,
    make_palette,
    run,
)

from igpt_jax import checkpoint
from igpt_jax.config import ExportConfig, MeshConfig, ModelConfig, UserError
from igpt_jax.evaluation import linear_probe, probing
from igpt_jax.jobs import convert
from igpt_jax.model import objectives
from igpt_jax.model.features import make_feature_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate
from igpt_jax.parallel import sharding
from igpt_jax.weights import certificate, huggingface, names, open_weights, openai
from igpt_jax.weights.names import Part


class Reversed(Part):
    """A part whose first dim is reversed, in both directions."""

    def to_ours(self, array, sizes):
        return super().to_ours(array, sizes)[::-1]

    def to_foreign(self, array, sizes):
        return super().to_foreign(array[::-1], sizes)


C_ATTN, Q, K, V = "transformer.h.{}.attn.c_attn.weight", *(f"model/h{{}}/attn/{each}_proj" for each in "qkv")
PLANTED = {  # error -> tensors of the table that are wrong, with their wrong parts
    "transposed q": {C_ATTN: [Part("query_DNH", "NH D"), Part("key_DNH", "D NH"), Part("value_DNH", "D NH")]},
    "swapped k and v": {C_ATTN: [Part("query_DNH", "D NH"), Part("value_DNH", "D NH"), Part("key_DNH", "D NH")]},
    "masked, swapped q and k": {Q: [Part("key_DNH", "N H D")], K: [Part("query_DNH", "N H D")]},
    "masked, swapped k and v": {K: [Part("value_DNH", "N H D")], V: [Part("key_DNH", "N H D")]},
    "transposed class head": {"score.weight": [Part("class_head_KD", "D K")]},
    "swapped classes": {"score.weight": [Reversed("class_head_KD", "K D")]},
}


@pytest.mark.parametrize("error", PLANTED)
def test_the_certificate_catches_an_error_in_the_table(tmp_path, monkeypatch, error):
    """A wrong table reads back what it wrote, so that hashes agree. The logits differ, and the job refuses the result.

    Seen to fail without logits in the verdict, and without those of the classes.
    """
    def wrong(table):
        return tuple(tensor._replace(parts=tuple(PLANTED[error].get(tensor.name, tensor.parts))) for tensor in table)

    source, more, head = f"huggingface:{tmp_path}/hf", {}, "class_logits" if "class" in error else "logits"
    if "masked" in error:
        make_openai(tmp_path / "bert" / "model.ckpt-1", "small", 0, start=False)
        source, more = f"openai:{tmp_path}/bert", {"palette": make_palette(tmp_path / "palette.npy", 13)}
    else:
        kind = "ImageGPTForImageClassification" if "class" in error else "ImageGPTForCausalImageModeling"
        classes = SIZES["small"]["embed"]  # makes the head square, so that its transpose has the same shape
        make_huggingface(tmp_path / "hf", "small", 0, kind, classes)
    monkeypatch.setattr(openai, "OPENAI", wrong(names.OPENAI))
    for architecture, table in names.HUGGING_FACE.items():
        monkeypatch.setitem(names.HUGGING_FACE, architecture, wrong(table))
    with pytest.raises(UserError, match="not the same model: their logits are"):
        run(tmp_path / "a", source, "", **more)
    record = json.loads((tmp_path / "a" / convert.CERTIFICATE).read_text())
    assert record["verdict"] == "differs" and not record["differing"] and record[head]["max_difference"] > 0.1


@pytest.mark.parametrize("layers", [[0], [0, 0]], ids=["dropped", "repeated"])
def test_the_certificate_catches_a_lost_layer(tmp_path, layers):
    """The last of two layers dropped, or the first written twice: the parameters that differ are named.

    Seen to fail with only the number of parameters compared.
    """
    make_huggingface(tmp_path / "hf", "small", 0)
    source = open_weights("huggingface", f"{tmp_path}/hf")

    def kept(name):
        arrays = source.layers(name)
        return [arrays[layer] for layer in layers] if len(arrays) > 1 else arrays

    wrong = types.SimpleNamespace(sizes={**source.sizes, "L": len(layers)}, layers=kept, names=source.names)
    (tmp_path / "wrong").mkdir()
    huggingface.write(wrong, tmp_path / "wrong", huggingface.PIXELS, source.palette_VC, 0.0)
    record = certificate.certify(source, open_weights("huggingface", f"{tmp_path}/wrong"), compare_logits=True)
    assert record["verdict"] == "differs" and len(record["differing"]) == 8
    assert any(name.startswith("query_DNH") for name in record["differing"])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "hf"
    make_huggingface(folder, "small", 0)
    return folder


def test_mistakes_are_refused(tmp_path, original):
    """Each with one line. Seen to fail with the check of masked models left out."""
    make_openai(tmp_path / "bert" / "model.ckpt-5", "small", 0, start=False)
    palette = make_palette(tmp_path / "palette.npy", 13)
    cases = [
        (f"openai:{tmp_path}/bert", f"huggingface:{tmp_path}/hf", palette, "masked .BERT. model; transformers"),
        (f"openai:{tmp_path}/bert", f"export:{tmp_path}/programs", palette, "as an exported sampler does"),
        (f"openai:{tmp_path}/bert", "", "", "comes without its palette"),
        (f"openai:{tmp_path}/bert", "", make_palette(tmp_path / "p14.npy", 14), "has 14 colors"),
        (f"openai:{tmp_path}/none", "", "", "cannot be read"),
        (f"openai:{tmp_path}", "", "", "holds 0 checkpoints"),
        (f"huggingface:{original}", f"huggingface:{tmp_path}", "", "is already there"),
        (f"huggingface:{original}", f"torch:{tmp_path}", "", "'torch:.* is not known"),
        (f"huggingface:{tmp_path}/none", "", "", "does not exist"),
        ("", "", "", "must read openai:PATH or"),
    ]
    for source, target, colors, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / "out", source, target, palette=colors)
        assert len(str(caught.value).splitlines()) == 1


def test_every_parameter_of_the_model_is_in_both_tables():
    """And no other, except the class head's. Seen to fail with model/sos left out."""
    params = Model(ModelConfig("igpt_tiny"), 512, 32, "float32").abstract_parameters()
    ours = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for table in (names.OPENAI, (*names.HUGGING_FACE[huggingface.PIXELS],
                                 names.HUGGING_FACE[huggingface.CLASSES][-1])):
        assert {part.ours for tensor in table for part in tensor.parts} == ours | {"class_head_KD"}
    assert sum(math.prod(shape) for shape in names.expected(
        openai.table_for(ours), {"L": 24, "D": 512, "N": 8, "H": 64, "F": 2048, "V": 512, "T": 1024}).values()
    ) == 76_571_648


def test_exported_programs_run_where_only_jax_is_installed(tmp_path, original, python):
    """run.py in a process that cannot import igpt_jax gives `generate`'s tokens, their losses, features and classes.

    Seen to fail with the seeds of the exported sampler counted from 1, and with the probe at the next layer.
    """
    D = json.loads((original / "config.json").read_text())["n_embd"]
    rng = np.random.default_rng(0)
    probe = linear_probe.Probe(rng.normal(size=D), rng.uniform(1, 2, D), rng.normal(size=(D, 4)), rng.normal(size=4))
    probing.save_probe(tmp_path / "probe" / "probe.npz", probing.SavedProbe(probe, 1, "normalized", ""))
    _, record = run(tmp_path / "job", f"huggingface:{original}", f"export:{tmp_path}/out",
                    export=ExportConfig(rows=2, top_k=7, platforms=("cpu",), probe=str(tmp_path / "probe")))
    assert record["verdict"] == "same" and abs(np.subtract(*record["nats_per_pixel"].values())) < 1e-5
    python("run_exported.py", tmp_path / "out/run.py", tmp_path / "drawn.npz", devices=1)

    run(tmp_path / "another", f"huggingface:{original}", f"orbax:{tmp_path}/ours")
    mesh = sharding.make_mesh(MeshConfig())
    model, params, _ = checkpoint.load_model(str(tmp_path / "ours"), mesh, "float32", "reference")
    keys = jax.vmap(jax.random.key)(np.arange(3))
    tokens = jax.jit(generate, static_argnums=(0, 4))(model, params, np.zeros((3, 10), np.int32), keys,
                                                      Sampling(top_k=7))
    with np.load(tmp_path / "drawn.npz") as drawn:
        np.testing.assert_array_equal(drawn["tokens"], tokens)
        assert drawn["images"].shape == (3, 5, 5, 3) and drawn["images"].dtype == np.uint8
    expected = objectives.nats_per_token(jax.jit(model.logits)(params, tokens), tokens).mean(axis=1)
    np.testing.assert_allclose(np.load(f"{tmp_path}/drawn.npz.npy"), expected, rtol=1e-5)
    features = jax.jit(make_feature_step(model, "normalized"))(params, tokens)[:, 0]
    np.testing.assert_allclose(np.load(f"{tmp_path}/drawn.npz.features.npy"), features, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.load(f"{tmp_path}/drawn.npz.classes.npy").argmax(1), probe.predict(features[:, 1]))


@pytest.mark.slow
def test_conversion_holds_less_than_two_of_the_largest_tensors(tmp_path, python):
    """Memory that a conversion adds to a process with TensorFlow loaded. The model has 777 MiB, its largest tensor 256.

    The assembled parameters do not count, since they are in a memory-mapped file.

    Seen to fail, at 3 times the largest tensor each, with Orbax's default database, with all layers of one parameter
    held while the next is read, and with glibc keeping freed memory. Also with shards of 128 MiB for TensorFlow (2.7
    times), and with our arrays read whole before they are copied.
    """
    L, D = 16, 1024
    sizes = {"L": L, "D": D, "N": 8, "H": D // 8, "F": 4 * D, "V": 512, "T": 1024}
    rng = np.random.default_rng(0)

    def layers(name):
        shape = [sizes[letter] for letter in name.rsplit("_", 1)[1]]
        stacked = any(part.ours == name and tensor.stacked for tensor in names.OPENAI for part in tensor.parts)
        return names.Layers(L if stacked else 1, lambda layer: rng.standard_normal(shape, np.float32))

    (tmp_path / "hf").mkdir()
    palette_VC = rng.uniform(-1, 1, (512, 3)).astype(np.float32)
    source = types.SimpleNamespace(sizes=sizes, layers=layers)
    huggingface.write(source, tmp_path / "hf", huggingface.PIXELS, palette_VC, 0.0)
    np.save(tmp_path / "palette.npy", palette_VC)
    print(python("conversion_memory.py", tmp_path, L * D * 4 * D * 4 / 2**20, devices=1).stdout)
