"""Small models in transformers' and OpenAI's formats, and the convert job on them, for tests of weights."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from igpt_jax.config import ConvertConfig
from igpt_jax.jobs import convert
from igpt_jax.runtime.precision import set_precision

SIZES = {"small": {"layers": 2, "embed": 24, "heads": 2, "colors": 13, "side": 5},
         "wide": {"layers": 3, "embed": 32, "heads": 4, "colors": 20, "side": 4}}


@pytest.fixture(autouse=True)
def float32():
    """Computes in float32."""
    set_precision("float32")  # as run_job does
    yield
    set_precision("bfloat16")


def make_huggingface(folder, size, seed, kind="ImageGPTForCausalImageModeling", classes=7):
    """Saves a model of transformers with random weights and gains, zero biases, and a palette. Returns the model."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    transformers.utils.logging.disable_progress_bar()
    s = SIZES[size]
    config = transformers.ImageGPTConfig(
        vocab_size=s["colors"] + 1, n_positions=s["side"] ** 2, n_embd=s["embed"], n_layer=s["layers"],
        n_head=s["heads"], num_labels=classes)
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias"):
                parameter.copy_((1 if "ln_" in name else 0) + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    palette_VC = np.random.default_rng(seed).uniform(-1, 1, (s["colors"], 3)).astype(np.float32)
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": palette_VC.tolist()}))
    return model


def make_openai(prefix, size, seed, start=True):
    """Writes a TF1 checkpoint with the released names and shapes, and an optimizer's variables. Returns the weights."""
    import tensorflow as tf

    s, rng = SIZES[size], np.random.default_rng(seed)
    L, D, N, V, T = s["layers"], s["embed"], s["heads"], s["colors"], s["side"] ** 2
    shapes = {"wte": (V, D), "wtet": (V, D), "wpe": (T, D), "ln_f/g": (D,)} | ({"sos": (D,)} if start else {})
    for i in range(L):
        shapes |= {f"h{i}/ln_1/g": (D,), f"h{i}/ln_2/g": (D,), f"h{i}/mlp/c_fc/w": (D, 4 * D),
                   f"h{i}/mlp/c_proj/w": (4 * D, D)}
        shapes |= {f"h{i}/attn/{name}": (N, D // N, D) for name in ("q_proj", "k_proj", "v_proj", "c_proj")}
    arrays = {f"model/{name}": rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    saved = arrays | {"global_step": np.int64(131000), "model/wte/adam_v": np.zeros((V, D), np.float32)}
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=list(saved), shape_and_slices=[""] * len(saved),
                      tensors=list(saved.values()))
    return arrays


def make_palette(path, colors):
    """Writes random colors as .npy. Returns the path as text."""
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (colors, 3)).astype(np.float32))
    return str(path)


def run(folder, source, target, **more):
    """Runs the convert job in this process. Returns its metrics and its certificate."""
    folder.mkdir(exist_ok=True)
    metrics = convert.run(ConvertConfig(convert_from=source, convert_to=target, **more), str(folder))
    return metrics, json.loads((folder / convert.CERTIFICATE).read_text())


def change(folder, edit):
    """Edits the tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
