"""Hugging Face folders of transformers' ImageGPT: config.json, safetensors (one file or several) and the palette."""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.model.layers import NORM_EPSILON
from igpt_jax.weights import names
from igpt_jax.weights.frameworks import has_transformers
from igpt_jax.weights.names import HUGGING_FACE, ForeignWeights, Tensor, Weights

PIXELS, CLASSES = HUGGING_FACE
SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained splits
LEGACY = (".attn.bias", ".attn.masked_bias")  # masks that old versions saved as if they were weights
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# The model has these settings fixed. A config.json with another value describes a different model.
COMPUTES = {"activation_function": "quick_gelu", "layer_norm_epsilon": NORM_EPSILON, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


class HuggingFaceWeights(ForeignWeights):
    """A folder that `save_pretrained` of transformers, or `write`, made.

    Raises:
      UserError: missing files, pickles, another model, tensors that do not fit, or biases that are not zero.
    """

    framework = "transformers"

    def __init__(self, path: str):
        where = f"huggingface:{path}"
        if not storage.is_local(storage.path(path)):
            raise UserError(f"{where}: safetensors files are read from a local folder. Copy it first.")
        self._folder = Path(storage.path(path))
        config = self._json("config.json", where)
        self._files, found = _open(self._folder, where)
        self.architecture = CLASSES if "score.weight" in found else PIXELS
        sizes, table = _sizes(where, config, found), HUGGING_FACE[self.architecture]
        for name, value in COMPUTES.items():
            if config.get(name, value) != value:
                raise UserError(f"{where}: config.json has {name}={config[name]!r}; this model has {value!r}.")
        self._shapes = {name: shape for name, shape in found.items() if not name.endswith(LEGACY)}
        names.check(where, self._shapes, table, sizes)
        super().__init__(where, table, sizes, self._slice)
        self._refuse_biases(where, table)

    def outputs(self, tokens_BT: np.ndarray, hidden_BT: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """By transformers' own model, fed the start symbol and then all pixels but the last."""
        if not has_transformers():
            return {}
        import torch  # several seconds
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = getattr(transformers, self.architecture).from_pretrained(self._folder, dtype=torch.float32).eval()
        inputs_BT = np.insert(tokens_BT[:, :-1], 0, self.sizes["V"], axis=1)
        with torch.inference_mode():
            logits = model(torch.from_numpy(inputs_BT), use_cache=False).logits.numpy()
        return {"pixels" if self.architecture == PIXELS else "classes": logits}

    def _json(self, name: str, where: str) -> dict[str, Any]:
        try:
            value = storage.parse_json(storage.read(storage.path(self._folder / name)))
        except ValueError:
            raise UserError(f"{where}: {name} is not JSON. Export the folder again.") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} is not an object of JSON. Export the folder again.")
        return value

    @functools.cached_property
    def palette_VC(self) -> np.ndarray | None:
        """Read on first use: if the user gives a palette, the one in preprocessor_config.json may be damaged."""
        where, colors = self._where, self.sizes["V"]
        processor = self._folder / "preprocessor_config.json"
        clusters = self._json(processor.name, where).get("clusters") if processor.exists() else None
        if clusters is None:
            return None
        try:
            palette_VC = np.asarray(clusters, np.float32)
        except (ValueError, TypeError):
            palette_VC = np.empty(0)
        if palette_VC.shape != (colors, 3) or not (np.abs(palette_VC) <= 1).all():
            raise UserError(f"{where}: clusters in preprocessor_config.json must be {colors} colors in [-1, 1]. "
                            "Repair it, or set --config.palette.")
        return palette_VC

    def _slice(self, name: str, axis: int, start: int, stop: int) -> np.ndarray:
        tensor = self._files[name].get_slice(name)
        return tensor[start:stop] if axis == 0 else tensor[:, start:stop]

    def _refuse_biases(self, where: str, table: tuple[Tensor, ...]) -> None:
        biases = [tensor.bias.format(layer) for tensor in table if tensor.bias for layer in range(self.sizes["L"])]
        trained = [name for name in biases if np.any(self._slice(name, 0, 0, self._shapes[name][0]))]
        if trained:
            raise UserError(f"{where}: {trained[0]} is not zero, nor are {len(trained) - 1} other biases. The "
                            "published model has no biases, so a model that was fine-tuned with them cannot be "
                            "converted.")


def _open(folder: Path, where: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """By tensor name: the open file that holds it, and its shape."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("Hugging Face's files are read by safetensors, which is not installed. "
                        "Run `pip install safetensors`.") from None
    files, shapes = {}, {}
    for file in _safetensors_in(folder, where):
        try:
            opened = safe_open(str(file), framework="numpy")
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                tensor = opened.get_slice(name)
                if name in files:
                    raise UserError(f"{where}: {name} is in two files. Export the folder again.")
                if tensor.get_dtype() != "F32" and not name.endswith(LEGACY):
                    raise UserError(f"{where}: {name} is {tensor.get_dtype()}; only F32 is converted. Load the model "
                                    "in transformers with dtype=torch.float32, and save it with save_pretrained.")
                files[name], shapes[name] = opened, tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{where}: {file.name} cannot be read: {str(error).splitlines()[0]}") from None
    return files, shapes


def _safetensors_in(folder: Path, where: str) -> list[Path]:
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(storage.parse_json(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: {index.name} is not an index of shards. Export the folder again.") from None
        outside = [shard for shard in shards if os.path.basename(str(shard)) != shard]
        if outside:
            raise UserError(f"{where}: {index.name} names {outside[0]!r}, which is not a file of this folder.")
        return [folder / shard for shard in shards]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise UserError(f"{where}: {pickles[0]} is a pickle. Pickles are not read, because that can run any code. On "
                        "an isolated machine, load the folder with transformers' from_pretrained, save it to a new "
                        "folder with save_pretrained, and convert the new folder.")
    raise UserError(f"{where} holds no model.safetensors. Give a folder that transformers' save_pretrained made.")


def _sizes(where: str, config: dict[str, Any], found: dict[str, tuple[int, ...]]) -> dict[str, int]:
    if config.get("model_type") != "imagegpt":
        raise UserError(f"{where}: config.json is of model type {config.get('model_type')!r}, not 'imagegpt'.")
    sizes = {letter: config.get(name, default) for letter, name, default in (
        ("L", "n_layer", 24), ("D", "n_embd", 512), ("N", "n_head", 8), ("T", "n_positions", 1024),
        ("V", "vocab_size", 513))}
    wrong = [value for value in sizes.values() if type(value) is not int or value < 1]
    if wrong or sizes["D"] % sizes["N"]:
        raise UserError(f"{where}: config.json must have positive integers n_layer, n_embd, n_head, n_positions and "
                        f"vocab_size, and n_embd must be a multiple of n_head. It has {list(sizes.values())}.")
    sizes |= {"V": sizes["V"] - 1, "H": sizes["D"] // sizes["N"], "F": config.get("n_inner") or 4 * sizes["D"]}
    return sizes | ({"K": found["score.weight"][0]} if "score.weight" in found else {})


def write(weights: Weights, folder: Path, architecture: str, palette_VC: np.ndarray, dropout: float) -> None:
    """Writes the folder that transformers' `from_pretrained` reads, one tensor in memory at a time.

    Args:
      weights: to write.
      folder: exists and is empty.
      architecture: a key of HUGGING_FACE.
      palette_VC: goes into preprocessor_config.json.
      dropout: of the residual stream while training.
    """
    sizes, table = weights.sizes, HUGGING_FACE[architecture]
    config = {"architectures": [architecture], "model_type": "imagegpt", "vocab_size": sizes["V"] + 1,
              "n_positions": sizes["T"], "n_embd": sizes["D"], "n_layer": sizes["L"], "n_head": sizes["N"],
              "n_inner": sizes["F"], "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0,
              "initializer_range": 0.02, "reorder_and_upcast_attn": False, "tie_word_embeddings": False,
              "use_cache": True, "dtype": "float32", **COMPUTES}
    if "K" in sizes and architecture == CLASSES:
        config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(sizes["K"])},
                   "label2id": {f"LABEL_{i}": i for i in range(sizes["K"])}}
    side = math.isqrt(sizes["T"])
    preprocessor = {"image_processor_type": "ImageGPTImageProcessor", "clusters": palette_VC.tolist(),
                    "do_resize": True, "size": {"height": side, "width": side}, "resample": 2,
                    "do_normalize": True, "do_color_quantize": True}
    shards = _shards(names.expected(table, sizes))
    made = names.foreign_tensors(weights, table)
    for file, shapes in shards.items():
        _write_safetensors(folder / file, shapes, made)
    if len(shards) > 1:
        total = sum(_bytes(shape) for shapes in shards.values() for shape in shapes.values())
        index = {"metadata": {"total_size": total},
                 "weight_map": {name: file for file, shapes in shards.items() for name in shapes}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _shards(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """File names, and the tensors of each, in their order."""
    groups, size = [{}], 0
    for name, shape in shapes.items():
        if groups[-1] and size + _bytes(shape) > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += _bytes(shape)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], made: Iterator[tuple[str, np.ndarray]]) -> None:
    """A safetensors file (8 bytes of length, a JSON header, the data), written as tensors come.

    safetensors' own writer takes a file's tensors all at once.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + _bytes(shape)]}
        offset += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (made_name, array) in zip(shapes, made, strict=False):
            assert name == made_name, f"{made_name} comes where the header says {name}"
            out.write(array.astype("<f4", copy=False).data)
