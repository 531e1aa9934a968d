"""OpenAI's TF1 checkpoints: reading, writing, and their released model's forward pass. TensorFlow reads the files.

B batch, T tokens, S key tokens, D embed, N heads, H head dim, V palette, K classes.
"""

import glob
import os
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.weights import names
from igpt_jax.weights.frameworks import triton_first
from igpt_jax.weights.names import OPENAI, ForeignWeights, Tensor, Weights

SHARD_BYTES = 32 * 2**20
# Optimizer state and step counters in the released files, which hold more than weights.
IGNORED = re.compile(r"adam_v|adam_m|AdamWeightDecayOptimizer|global_step|(^|/)_step")


def _tensorflow() -> Any:
    triton_first()
    try:
        import tensorflow  # 5 seconds and 665 MiB
    except ImportError:
        raise UserError("OpenAI's checkpoints are read by TensorFlow, which is not installed. "
                        "Run `pip install tensorflow-cpu`.") from None
    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def table_for(held: Iterable[str]) -> tuple[Tensor, ...]:
    """The rows of OPENAI for weights that hold the parameters `held`: start vector and class head may be absent."""
    held = set(held)
    return tuple(tensor for tensor in OPENAI if tensor.parts[0].ours in held)


class OpenAIWeights(ForeignWeights):
    """A checkpoint prefix (DIR/model.ckpt-1000000), or a folder that holds a single one.

    Raises:
      UserError: no checkpoint there, damaged, or not an ImageGPT's.
    """

    framework = "NumPy, after OpenAI's released code"

    def __init__(self, path: str):
        prefix, tensorflow = prefix_of(path), _tensorflow()
        try:
            self._reader = tensorflow.train.load_checkpoint(prefix)
            shapes = self._reader.get_variable_to_shape_map()
        except (ValueError, RuntimeError, tensorflow.errors.OpError) as error:
            raise UserError(f"openai:{path} cannot be read: {str(error).splitlines()[0]}") from None
        shapes = {name: tuple(shape) for name, shape in shapes.items() if not IGNORED.search(name)}
        sizes = _sizes(f"openai:{path}", shapes)
        absent = {"start_D": "model/sos", "class_head_KD": "model/clf/wclf"}
        table = table_for(tensor.parts[0].ours for tensor in OPENAI
                          if absent.get(tensor.parts[0].ours, "") in ("", *shapes))
        names.check(f"openai:{path}", shapes, table, sizes)
        step = re.search(r"ckpt-(\d+)$", prefix)
        super().__init__(f"openai:{path}", table, sizes, self._slice, steps_done=int(step[1]) if step else 0)

    def _slice(self, name: str, axis: int, start: int, stop: int) -> np.ndarray:
        return self._reader.get_tensor(name)  # no OpenAI variable holds more than one parameter

    @np.errstate(over="ignore", invalid="ignore")
    def outputs(self, tokens_BT: np.ndarray, hidden_BT: np.ndarray | None) -> dict[str, np.ndarray]:
        """By OpenAI's released code (model.py: norm, attn, mlp, gelu2, and its BERT form) written again in NumPy.

        It reads the variables by their own names and layouts, one block at a time, and so shares nothing with the
        table that it is there to check.
        """
        def get(name: str) -> np.ndarray:
            return self._reader.get_tensor(f"model/{name}")

        def norm(x, gain_D):
            return gain_D * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(1e-5))

        T = tokens_BT.shape[1]
        x_BTD, later_TS = get("wte")[tokens_BT], np.zeros((T, T), np.float32)
        if hidden_BT is None:
            start_B1D = np.broadcast_to(get("sos"), x_BTD[:, :1].shape)
            x_BTD, later_TS = np.concatenate([start_B1D, x_BTD[:, :-1]], 1), np.triu(later_TS - 1e10, 1)
        else:
            x_BTD = x_BTD * ~hidden_BT[..., None]
        x_BTD = x_BTD + get("wpe")[:T]
        for layer in range(self.sizes["L"]):
            n_BTD = norm(x_BTD, get(f"h{layer}/ln_1/g"))
            q, k, v = (np.einsum("BSD,NHD->BNSH", n_BTD, get(f"h{layer}/attn/{name}_proj"), optimize=True)
                       for name in "qkv")
            scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(np.float32(q.shape[-1])) + later_TS
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (weights / weights.sum(-1, keepdims=True)) @ v
            x_BTD = x_BTD + np.einsum("BNTH,NHD->BTD", attended, get(f"h{layer}/attn/c_proj"), optimize=True)
            h = norm(x_BTD, get(f"h{layer}/ln_2/g")) @ get(f"h{layer}/mlp/c_fc/w")
            x_BTD = x_BTD + (h / (1 + np.exp(-np.float32(1.702) * h))) @ get(f"h{layer}/mlp/c_proj/w")
        n_BTD = norm(x_BTD, get("ln_f/g"))
        return {"pixels": n_BTD @ get("wtet").T} | (
            {"classes": n_BTD.mean(1) @ get("clf/wclf").T} if "K" in self.sizes else {})


def prefix_of(path: str) -> str:
    """The prefix of a checkpoint's files, from that prefix or from a folder with one checkpoint. Raises UserError."""
    if not storage.is_local(storage.path(path)):
        raise UserError(f"openai:{path}: TensorFlow reads and writes local files here. Copy the checkpoint first.")
    if glob.has_magic(os.path.abspath(path)) or "\\" in os.path.abspath(path):
        raise UserError(f"openai:{path}: TensorFlow takes *, ?, [ and backslashes for a pattern. Give another path.")
    path = os.path.expanduser(path).removesuffix(".index").removesuffix(".meta")
    if not os.path.isdir(path):
        return path
    found = [file.removesuffix(".index") for file in glob.glob(f"{glob.escape(path)}/*.index")]
    if len(found) != 1:
        raise UserError(f"openai:{path} holds {len(found)} checkpoints (*.index). "
                        f"Name one: openai:{path}/model.ckpt-1000000")
    return found[0]


def _sizes(where: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model/h(\d+)/", name))}
    try:
        heads, head_dim, embed = shapes["model/h0/attn/q_proj"]
        sizes = {"L": max(layers) + 1, "D": embed, "N": heads, "H": head_dim, "F": shapes["model/h0/mlp/c_fc/w"][1],
                 "V": shapes["model/wte"][0], "T": shapes["model/wpe"][0]}
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{where}: not an ImageGPT. It needs model/wte, model/wpe, model/h0/attn/q_proj [heads, head "
                        f"dim, width] and model/h0/mlp/c_fc/w; it holds {', '.join(sorted(shapes)[:3])}, ...") from None
    return sizes | ({"K": shapes["model/clf/wclf"][0]} if "model/clf/wclf" in shapes else {})


def write(weights: Weights, prefix: str) -> None:
    """Writes a TF1 checkpoint of float32 variables at `prefix`; about 32 MiB of them are in memory at a time."""
    tensorflow = _tensorflow()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(prefix), prefix=".convert-") as folder:
        shards, pending, size = [], {}, 0

        def flush() -> None:
            shards.append(f"{folder}/{len(shards)}")
            tensorflow.raw_ops.SaveV2(prefix=shards[-1], tensor_names=list(pending),
                                      shape_and_slices=[""] * len(pending), tensors=list(pending.values()))
            pending.clear()

        for name, array in names.foreign_tensors(weights, table_for(weights.names)):
            if pending and size + array.nbytes > SHARD_BYTES:
                flush()
                size = 0
            pending[name] = array
            size += array.nbytes
        flush()
        tensorflow.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=prefix,
                                              delete_old_dirs=False)
