"""Hugging Face's format: bit-identical round trips, the same function in transformers, and refused files."""

import dataclasses
import json
import logging
import math

import numpy as np
import pytest
from conftest import run_job_command
from safetensors.numpy import load_file
from weights_files import SIZES, change, float32, make_huggingface, make_palette, run  # noqa: F401 (a fixture)

import igpt_jax
from igpt_jax import checkpoint
from igpt_jax.config import FinetuneConfig, FinetuneModelConfig, UserError
from igpt_jax.config.model import OF_CHECKPOINT
from igpt_jax.data.codecs import Palette
from igpt_jax.data.store import Store
from igpt_jax.data.token_file import tokens_of
from igpt_jax.weights import certificate, huggingface, open_weights, ours


def assert_loads_silently(folder):
    """transformers finds every weight and no other, and logs no warning. (Python's warnings are errors in tests.)"""
    import transformers

    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        _, info = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder, output_loading_info=True)
        transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoImageProcessor.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not any(info.values()) and not records, (info, [record.getMessage() for record in records])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_huggingface_to_ours_and_back_is_bit_identical(tmp_path, size, seed):
    """Every tensor's bytes; logits within 1e-4 of transformers' in float32, both ways; the palette's bytes.

    Seen to fail with k before q in the table's c_attn.
    """
    make_huggingface(tmp_path / "hf", size, seed)
    metrics, there = run(tmp_path / "a", f"huggingface:{tmp_path}/hf", "")
    _, back = run(tmp_path / "b", f"orbax:{tmp_path}/a", f"huggingface:{tmp_path}/back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    for record in (there, back):
        assert record["verdict"] == "same" and record["logits"]["max_difference"] < 1e-4
        nats = record["logits"]["nats_per_pixel"]
        assert abs(nats["source"] - nats["target"]) < 1e-5 < abs(nats["source"] - math.log(SIZES[size]["colors"]))
    assert there["tensors"]["source"] == back["tensors"]["target"]
    assert metrics["parameters"] == sum(array.size for name, array in before.items() if not name.endswith("bias"))
    assert_loads_silently(tmp_path / "back")
    palettes = [json.loads((tmp_path / name / "preprocessor_config.json").read_text())["clusters"]
                for name in ("hf", "back")]
    assert palettes[0] == palettes[1]


def test_a_classifier_comes_back_whole_with_its_logits(tmp_path):
    """ImageGPTForImageClassification there and back; the checkpoint between has its classes, and OpenAI's files too.

    Seen to fail with transformers fed the pixels unshifted, with metadata without classes, and with the check of the
    head's layer left out.
    """
    make_huggingface(tmp_path / "hf", "small", 0, "ImageGPTForImageClassification")
    _, there = run(tmp_path / "a", f"huggingface:{tmp_path}/hf", "")
    _, back = run(tmp_path / "b", f"orbax:{tmp_path}/a", f"huggingface:{tmp_path}/back", head="classes")
    _, across = run(tmp_path / "c", f"orbax:{tmp_path}/a", f"openai:{tmp_path}/oa/model.ckpt-1")
    for record in (there, back, across):
        assert record["verdict"] == "same" and record["class_logits"]["max_difference"] < 1e-4
    assert not there["logits"]["compared"] and "class_head_KD" not in there["not_carried"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    outputs = open_weights("orbax", f"{tmp_path}/a").outputs(np.zeros((1, 25), np.int64), None)
    np.testing.assert_array_equal(outputs["pixels"], 0)  # an untrained head for pixels
    assert np.abs(outputs["classes"]).max() > 0.1 and across["logits"]["compared"]
    for target in ("openai", "export"):
        with pytest.raises(UserError, match="holds no head for pixels"):
            run(tmp_path / "d", f"huggingface:{tmp_path}/hf", f"{target}:{tmp_path}/none")
    with pytest.raises(UserError, match="holds no head for pixels"):
        igpt_jax.load(f"huggingface:{tmp_path}/hf").sample(1)

    record = checkpoint.load_metadata(f"{tmp_path}/a")
    sizes = {name: getattr(record.config.model, name) for name in ("name", *OF_CHECKPOINT)}
    model = FinetuneModelConfig(class_layer=1, **sizes)
    params = ours.parameters(open_weights("orbax", f"{tmp_path}/a"), lambda shape, name: np.empty(shape, np.float32))
    ours.save(f"{tmp_path}/middle", params, dataclasses.replace(record, config=FinetuneConfig(model=model)))
    with pytest.raises(UserError, match="its class head reads layer 1"):
        run(tmp_path / "d", f"orbax:{tmp_path}/middle", f"huggingface:{tmp_path}/none", head="classes")


def test_shards_are_read_and_written(tmp_path, monkeypatch):
    """A folder of several files, with an index, both ways.

    Seen to fail with the tensors written in another order than the headers'.
    """
    model = make_huggingface(tmp_path / "one", "small", 0)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20kB")
    assert not (tmp_path / "hf/model.safetensors").exists()
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    palette = make_palette(tmp_path / "palette.npy", 13)
    run(tmp_path / "a", f"huggingface:{tmp_path}/hf", f"huggingface:{tmp_path}/back", palette=palette)
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    joined = {name: array for file in files for name, array in load_file(tmp_path / "back" / file).items()}
    whole = load_file(tmp_path / "one/model.safetensors")
    assert joined.keys() == whole.keys() and all(np.array_equal(joined[name], whole[name]) for name in whole)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _train_bias(t):
    t["transformer.h.1.attn.c_proj.bias"][3] = 1e-3


def _half(t):
    t["lm_head.weight"] = t["lm_head.weight"].astype(np.float16)


def _transpose(t):
    t["transformer.h.0.mlp.c_fc.weight"] = np.ascontiguousarray(t["transformer.h.0.mlp.c_fc.weight"].T)


REFUSED = {
    "trained biases": (lambda f: change(f, _train_bias), "h.1.attn.c_proj.bias is not zero"),
    "missing": (lambda f: change(f, lambda t: t.pop("transformer.h.1.ln_2.weight")), "h.1.ln_2.weight is missing"),
    "unknown": (lambda f: change(f, lambda t: t.update(extra=np.zeros(3, np.float32))), "extra is unknown"),
    "shape": (lambda f: change(f, _transpose), r"c_fc.weight is \[96, 24\], not \[24, 96\]"),
    "half": (lambda f: change(f, _half), "lm_head.weight is F16"),
    "more layers": (lambda f: change_config(f, n_layer=3), "h.2.ln_1.weight is missing"),
    "fewer layers": (lambda f: change_config(f, n_layer=1), "h.1.attn.c_attn.bias is unknown"),
    "other activation": (lambda f: change_config(f, activation_function="gelu"), "activation_function='gelu'"),
    "other model": (lambda f: change_config(f, model_type="gpt2"), "model type 'gpt2'"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 9), "model.safetensors cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "clusters": (lambda f: (f / "preprocessor_config.json").write_text('{"clusters": [[1]]}'), "13 colors"),
    "outside": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}')), "not a file of this folder"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "hf"
    make_huggingface(folder, "small", 0)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_and_damaged_files_are_refused(tmp_path, original, case):
    """Seen to fail with a ValueError in place of one UserError."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, message = REFUSED[case]
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        assert open_weights("huggingface", str(tmp_path)).palette_VC is not None
    assert "\n" not in str(caught.value)


def test_legacy_masks_are_ignored(tmp_path, original):
    """Old versions of transformers saved causal masks under the names of biases. Seen to fail with LEGACY empty."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path, lambda t: t.update({"transformer.h.0.attn.bias": np.tri(25, dtype=np.uint8)[None, None],
                                         "transformer.h.0.attn.masked_bias": np.float32([-1e4])}))
    one, other = (open_weights("huggingface", str(folder)) for folder in (original, tmp_path))
    assert certificate.certify(one, other, compare_logits=False)["differing"] == []


def test_a_model_trained_here_gives_the_same_loss_in_transformers(tmp_path):
    """pretrain -> convert -> transformers on the held-out digits, and `evaluate` on them as a file of tokens: 1e-5.

    Seen to fail with transformers fed the pixels unshifted, as its image processor gives them.
    """
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    store, trained = tmp_path / "store", tmp_path / "trained"
    tiny = ["--config.model.name=igpt_tiny", "--config.model.layers=2", "--config.model.embed=32",
            "--config.model.heads=2", "--config.steps=30", "--config.batch_size=32", "--config.precision=float32",
            "--config.optimizer.warmup_steps=2", "--config.data.held_out="]

    def command(*arguments):
        done = run_job_command(*arguments)
        assert done.returncode == 0, done.stderr
        return done

    command("prepare", f"--workdir={store}")
    command("pretrain", f"--workdir={trained}", f"--config.data.store={store}", *tiny)
    split = Store.open(store).split("held_out")
    tokens = tokens_of(split, Palette(Store.open(store).palette), np.arange(split.count)).astype(np.int64)
    np.save(tmp_path / "teX.npy", tokens)
    command("evaluate", f"--workdir={tmp_path}/e", f"--config.checkpoints={trained}",
            f"--config.tokens={tmp_path}/teX.npy")
    log = command("convert", f"--workdir={tmp_path}/c", f"--config.convert_from=orbax:{trained}",
                   f"--config.convert_to=huggingface:{tmp_path}/hf").stderr
    assert len(log.splitlines()) == 2 and "max_logit_difference" in log  # a line at the start and one at the end
    ours, = json.loads((tmp_path / "e/result.json").read_text())["metrics"]["nats_per_pixel"].values()

    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "hf").eval()
    inputs = torch.from_numpy(np.insert(tokens[:, :-1], 0, model.config.vocab_size - 1, axis=1))
    with torch.inference_mode():
        logits = model(inputs).logits.double()
    theirs = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens).flatten()))
    assert ours == pytest.approx(theirs, abs=1e-5) and ours < 2.8  # ln 17 = 2.833: it has learned something
