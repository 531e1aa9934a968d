"""Our own checkpoints, as weights to convert: read one parameter at a time, written from a file of mapped memory."""

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import Metadata
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.config import MODELS, MeshConfig, ModelConfig, PretrainConfig, UserError
from igpt_jax.model.dims import Dims
from igpt_jax.model.parametrization import folded
from igpt_jax.parallel import checksums, sharding
from igpt_jax.parallel.trees import by_name
from igpt_jax.storage import hashes
from igpt_jax.weights import names
from igpt_jax.weights.names import OPENAI, Weights

OUTSIDE_BLOCKS = frozenset(tensor.parts[0].ours for tensor in OPENAI if not tensor.stacked)


class OurWeights:
    """The parameters of a checkpoint: a workdir (its newest step) or one step of it."""

    framework = "igpt_jax"

    def __init__(self, path: str, parameters: str = "raw"):
        self.path, self._parameters = step_path(*checkpoint.locate(path)), parameters  # a run may save a newer one
        self.record = checkpoint.load_metadata(str(self.path))
        checkpoint.require_parameters(self.record, parameters, path)
        self._tree = {"raw": ("params",), "ema": ("training", "ema")}[parameters]
        checkpoint.prepare_orbax()
        tree = ocp.checkpointables_metadata(self.path).metadata
        for name in self._tree:
            tree = tree[name]
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        self._shapes = {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
        self.palette_VC, self.steps_done = self.record.palette_VC, self.record.steps_done
        self.names = tuple(path[-1] for path in self._shapes)
        classes = self._shapes.get(("class_head_KD",), (0,))[0]
        config = self.record.config
        if config.codec != "palette" or config.model.positions != "learned":
            raise UserError(f"checkpoint {path} has codec={config.codec} and model.positions={config.model.positions}. "
                            "Files of OpenAI and Hugging Face, and exports, hold palettes and learned positions only.")
        dims = Dims.of(config.model, len(self.palette_VC), self.record.image_size, classes)
        self.sizes = {letter: size for letter, size in dataclasses.asdict(dims).items() if size}

    def layers(self, name: str) -> Sequence[np.ndarray]:
        array = self._load(name)
        return array[None] if name in OUTSIDE_BLOCKS else array

    def tensor_names(self) -> list[str]:
        return ["/".join(path) for path in self._shapes]

    def tensor(self, name: str) -> np.ndarray:
        return self._load(name.rpartition("/")[2])

    def outputs(self, tokens_BT: np.ndarray, hidden_BT: np.ndarray | None) -> dict[str, np.ndarray]:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        model, params, _ = checkpoint.load_model(str(self.path), mesh, "float32", parameters=self._parameters)
        pixels_BTV, classes_BK = jax.jit(model.outputs)(params, tokens_BT.astype(np.int32), None, hidden_BT)
        found = {"pixels": pixels_BTV} | ({} if classes_BK is None else {"classes": classes_BK})
        return jax.tree.map(np.asarray, found)

    def _load(self, name: str) -> np.ndarray:
        """One parameter, float32, in the host's memory. Raises UserError where it is not what was saved, or not
        finite."""
        folder, *path = (*self._tree, name) if name in OUTSIDE_BLOCKS else (*self._tree, "blocks", name)
        full_name = "/".join(path if folder == "training" else (folder, *path))  # as in the metadata's checksums
        damaged = UserError(f"checkpoint {self.path} is damaged: the array {full_name} is not what was saved. Name "
                            "another step.")
        try:
            array = _read(self.path / folder, ".".join(path))
        except ValueError as error:  # of TensorStore
            raise error if storage.unreachable(error) else damaged from None
        expected = self.record.checksums.get(full_name)
        exact = self.record.config.precision != "float64"
        if expected is not None and exact and checksums.of_host_array(array) != expected:
            raise damaged
        factor = folded(self.record.config.model, name)
        return names.finite(f"checkpoint {self.path}", full_name, array if factor == 1 else np.float32(factor) * array)


def _read(folder: storage.Path, name: str) -> np.ndarray:
    """An array of Orbax's, float32, read in slices of whole chunks: Orbax has all chunks on their way at once, which
    may take as much memory as the array itself.
    """
    kvstore = storage.tensorstore_spec(folder / name)
    if (folder / "manifest.ocdbt").exists():  # as training writes; `save` does not
        kvstore = {"driver": "ocdbt", "base": storage.tensorstore_spec(folder), "path": f"{name}/"}
    stored = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
    chunk = stored.chunk_layout.read_chunk.shape
    axis = max(range(stored.ndim), key=lambda axis: stored.shape[axis] / chunk[axis])
    if chunk[axis] >= stored.shape[axis]:
        with np.errstate(over="ignore"):  # of float64; what overflows is then found not to be finite
            return np.asarray(stored.read().result(), np.float32)
    array = np.empty(stored.shape, np.float32)
    for first in range(0, array.shape[axis], chunk[axis]):
        part = *[slice(None)] * axis, slice(first, first + chunk[axis])
        array[part] = stored[part].read().result()
    return array


def dropout_of(weights: Weights) -> float:
    """Of the residual stream while training; 0 where the files do not say, as in the paper."""
    return weights.record.config.model.dropout if isinstance(weights, OurWeights) else 0.0


def class_layer_of(weights: Weights) -> int:
    """The layer that the class head reads; -1, the last, in all files but ours."""
    finetuning = weights.record.config.finetuning if isinstance(weights, OurWeights) else None
    return finetuning.model.class_layer if finetuning else -1


def record_for(weights: Weights, palette_VC: np.ndarray) -> Metadata:
    """Metadata of a checkpoint made of weights: our checkpoint's own, or derived from the sizes."""
    if isinstance(weights, OurWeights):
        # What is written has no moving average beside its parameters, and the multipliers of completep are in them.
        config, base = weights.record.config, ModelConfig()
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, ema=0.0),
            model=dataclasses.replace(config.model, parametrization="standard", base_embed=base.base_embed,
                                      base_layers=base.base_layers))
        return dataclasses.replace(weights.record, config=config, palette_VC=palette_VC)
    sizes = weights.sizes
    row = (sizes["L"], sizes["D"], sizes["N"])
    name = next((name for name, sized in MODELS.items() if sized == row), ModelConfig().name)
    model = ModelConfig(name, layers=sizes["L"], embed=sizes["D"], heads=sizes["N"], mlp=sizes["F"])
    objective = "masked" if names.masked(weights) else "autoregressive"
    return Metadata(PretrainConfig(model=model, objective=objective), palette_VC, image_size=round(sizes["T"] ** 0.5),
                  data_fingerprint="", steps_done=weights.steps_done, classes=sizes.get("K", 0))


def write(weights: Weights, workdir: str, palette_VC: np.ndarray) -> None:
    """Writes WORKDIR/checkpoints/STEP. The stacked parameters lie in a temporary file, not in memory."""
    folder = storage.path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    parent = str(folder) if storage.is_local(folder) else None
    with tempfile.TemporaryDirectory(dir=parent, prefix=".convert-") as temporary:
        def mapped(shape: tuple[int, ...], name: str) -> np.ndarray:
            with open(f"{temporary}/{name}", "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file kills the process
                    os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
                file.truncate(4 * math.prod(shape))
            return np.memmap(f"{temporary}/{name}", np.float32, "r+", shape=shape)

        save(workdir, parameters(weights, mapped), record_for(weights, palette_VC))


def save(workdir: str, params: dict[str, Any], record: Metadata) -> None:
    """Writes WORKDIR/checkpoints/STEP with parameters alone; arrays of mapped files stay out of memory.

    Its arrays are files of their own, in chunks of 16 MiB: Orbax's usual single database holds all that it is to write
    in memory until the end.
    """
    sums = {name: checksums.of_host_array(array) for name, array in by_name({"params": params}).items()}
    path = step_path(storage.path(workdir) / "checkpoints", record.steps_done)
    checkpoint.prepare_orbax()
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    context.array_options.saving.storage_options.chunk_byte_size = 16 * 2**20
    context.memory_options.write_concurrent_bytes = 64 * 2**20
    context.memory_options.deepcopy_host_arrays = False
    with context, _quiet():
        ocp.save_checkpointables(path, {"params": params}, overwrite=True, custom_metadata=hashes.sealed(
            dataclasses.replace(record, checksums=sums).to_json()))
    if jax.process_index() == 0:
        hashes.write_hashes(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that there is no database to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def parameters(weights: Weights, make: Callable[[tuple[int, ...], str], np.ndarray]) -> dict[str, Any]:
    """All parameters, stacked as in our checkpoints, in arrays that `make(shape, name)` gives."""
    params: dict[str, Any] = {"blocks": {}}
    for tensor in OPENAI:
        name, letters = tensor.parts[0].ours, tensor.parts[0].letters
        if name in ("start_D", "class_head_KD") and name not in weights.names:
            continue
        array = make(tuple(weights.sizes[letter] for letter in ("L" if tensor.stacked else "") + letters), name)
        if name in weights.names:
            for layer, values in enumerate(weights.layers(name)):
                (array[layer] if tensor.stacked else array)[...] = values
        else:  # a head that is not there, as in a classifier, starts at zero
            array[...] = 0
        (params["blocks"] if tensor.stacked else params)[name] = array
    return params
