"""Unconditional samples, and completions of given pictures: the first rows stay, the model goes on from there.

Writes figures/samples.png, figures/completions.png (original, what was given, completions) and samples.npz with all
tokens. Needs nothing but a checkpoint; --config.images=FOLDER completes pictures of your own.
"""

import io
import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import SampleConfig, UserError
from igpt_jax.data import open_split, palette
from igpt_jax.data.images import SUFFIXES, Unusable, decode, read
from igpt_jax.data.resident import process_rows, put
from igpt_jax.data.store import tokens_of
from igpt_jax.metrics.figures import image_grid, save_png
from igpt_jax.metrics.logging import say
from igpt_jax.model.objectives import objective_of
from igpt_jax.model.sampling import NOT_FINITE, Sampling, generate
from igpt_jax.parallel import sharding

UNKNOWN = 127  # grey level of the pixels that the model was not given
EXAMPLES, COUNT = 16, 64  # where the config leaves them open


def run(config: SampleConfig, workdir: str) -> dict[str, Any]:
    """Samples. Returns `images_per_second` (compilation included, once per kind) and how many of each kind.

    Raises:
      UserError: the checkpoint is missing, the pictures or the data do not fit it, or nothing was asked for.
    """
    mesh = sharding.make_mesh(config.mesh)
    trained = checkpoint.load_metadata(config.checkpoint).config
    if not objective_of(trained).causal:
        raise UserError(f"checkpoint {config.checkpoint} was trained with objective={trained.objective}: it cannot "
                        "draw one pixel after the other. Give one of autoregressive training.")
    model, params, record = checkpoint.load_model(config.checkpoint, mesh, config.precision)
    size = record.image_size
    rows = size // 2 if config.rows < 0 else config.rows
    if rows > size:
        raise UserError(f"rows={rows} exceeds the model's {size} rows. Choose 0 to {size}.")
    count = (0 if config.images else COUNT) if config.count < 0 else config.count
    originals_BT, names = _originals(config, record)
    if not (count or len(names)):
        raise UserError("nothing to sample: no images, examples=0 and count=0. Set one of them.")
    draw = _Drawing(model, params, config, mesh)
    figures, arrays = storage.path(workdir) / "figures", {}
    start = time.perf_counter()

    if count:
        index_B2 = np.stack([np.arange(count), np.zeros(count, int)], axis=1)
        arrays["samples"] = draw("samples", np.zeros((count, 0), np.int32), index_B2)
        _save_grid(figures / "samples.png", _pictures(arrays["samples"], record), math.isqrt(count - 1) + 1)

    if len(names):
        index_B2 = np.stack(np.divmod(np.arange(len(names) * config.completions), config.completions), axis=1)
        given_BP = originals_BT[index_B2[:, 0], :rows * size]
        completed_BT = draw("completions", given_BP, index_B2)
        arrays |= {"originals": originals_BT, "names": np.array(names),
                   "completions": completed_BT.reshape(len(names), config.completions, -1)}
        original_BYXC = _pictures(originals_BT, record)
        known_BYXC = original_BYXC.copy()
        known_BYXC[:, rows:] = UNKNOWN
        completions = _pictures(completed_BT, record).reshape(len(names), config.completions, size, size, 3)
        grid = np.concatenate([original_BYXC[:, None], known_BYXC[:, None], completions], axis=1)
        _save_grid(figures / "completions.png", grid.reshape(-1, size, size, 3), grid.shape[1])

    seconds = time.perf_counter() - start
    if jax.process_index() == 0:
        file = io.BytesIO()
        np.savez_compressed(file, palette=record.palette_VC, **arrays)
        storage.publish(storage.path(workdir) / "samples.npz", file.getvalue())
    completions = len(names) * config.completions
    return {"images_per_second": (count + completions) / seconds, "samples": count, "completions": completions}


def _originals(config: SampleConfig, record: Metadata) -> tuple[np.ndarray, list[str]]:
    """Tokens int32 [B, T] of the pictures to complete, and what each is called."""
    size, table = record.image_size, palette.lookup_table(record.palette_VC)
    if config.images:
        images_BYXC, names = _users_pictures(config.images, size)
        return palette.encode(images_BYXC, table).astype(np.int32), names
    store = config.data.store or record.config.data.store
    if config.examples == 0 or not store and config.examples < 0:
        return np.zeros((0, size ** 2), np.int32), []
    if config.examples < 0 and not config.data.store and not storage.path(store).exists():
        say(f"no completions: the checkpoint's store {store} is not here. Set data.store or images.")
        return np.zeros((0, size ** 2), np.int32), []
    split = open_split(store, config.data.split, size)
    ids = np.arange(min(EXAMPLES if config.examples < 0 else config.examples, split.count))
    return tokens_of(split, table, ids).astype(np.int32), [f"{config.data.split} {i}" for i in ids]


def _users_pictures(typed: str, size: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [B, Y, X, 3] and names of the pictures that a folder, a file or a glob stands for; says what it leaves out.

    Raises:
      UserError: no picture there, or none that can be used.
    """
    files = []
    for path in storage.matching(typed):
        children = storage.children(path) if path.is_dir() else []
        here = [child for child in children if child.suffix.lower() in SUFFIXES and child.is_file()]
        files += here if path.is_dir() else [path]
    images, unusable = {}, {}
    for name, file in _named(files).items():
        try:
            images[name] = decode(read(file), size)
        except Unusable as reason:
            unusable[name] = str(reason)
    if not images:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable.items())
        raise UserError(f"images={typed!r} holds no picture that can be used{f' ({reasons})' if reasons else ''}. "
                        f"Give JPEG, PNG or WebP files of at least {size}x{size} pixels.")
    for name, reason in unusable.items():
        say(f"left out {name}: {reason}")
    return np.stack(list(images.values())), list(images)


def _named(files: Iterable[storage.Path]) -> dict[str, storage.Path]:
    """Files by their names, with as many of their folders as tell all of them apart."""
    files = list(dict.fromkeys(files))
    for parts in itertools.count(1):
        named = {"/".join(file.parts[-parts:]): file for file in files}
        if len(named) == len(files):
            return named


class _Drawing:
    """Draws batch by batch: (what, given tokens [B, P], indices [B, 2]) -> tokens [B, T].

    A sample draws from the seed folded with what it is and with its two indices: the image's and its own among the
    image's samples. So it changes neither with the batch size nor with how many others are drawn.
    """

    def __init__(self, model: Any, params: Any, config: SampleConfig, mesh: Mesh):
        self._params, self._config, self._mesh = params, config, mesh
        self._seed = jax.random.key(config.seed)
        sampling = Sampling(config.temperature, config.top_k, config.top_p)

        def run(params, given_BP, index_B2, kind):
            def fold(index_2):
                return jax.random.fold_in(jax.random.fold_in(kind, index_2[0]), index_2[1])
            cache_dtype = jnp.dtype(config.cache_dtype or config.precision)
            return generate(model, params, given_BP, jax.vmap(fold)(index_B2), sampling, cache_dtype)

        self._run = jax.jit(run, out_shardings=sharding.replicated(mesh))

    def __call__(self, what: str, given_BP: np.ndarray, index_B2: np.ndarray) -> np.ndarray:
        count, mesh = len(given_BP), self._mesh
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        wanted = self._config.batch_size or (16 if mesh.devices.flat[0].platform == "cpu" else 64)
        batch_size = -(-min(wanted, count) // parts) * parts
        place = sharding.batch_sharding(mesh)
        mine = process_rows(place, batch_size)
        kind = jax.random.fold_in(self._seed, ["samples", "completions"].index(what))
        out = []
        with jax.set_mesh(mesh), tqdm(total=count, unit="image", desc=what, disable=None) as bar:
            for start in range(0, count, batch_size):
                rows = np.arange(start, start + batch_size) % count  # those past the end are drawn again and dropped
                arguments = (put(whole[rows][mine].astype(np.int32), place, batch_size)
                             for whole in (given_BP, index_B2))
                out.append(np.asarray(self._run(self._params, *arguments, kind)))
                bar.update(min(batch_size, count - start))
        drawn_BT = np.concatenate(out)[:count]
        if (drawn_BT == NOT_FINITE).any():
            raise UserError(f"checkpoint {self._config.checkpoint}: its logits are not finite, though its weights are: "
                            f"they overflow in {self._config.precision}. Give another checkpoint.")
        return drawn_BT


def _pictures(tokens_BT: np.ndarray, record: Metadata) -> np.ndarray:
    """RGB uint8 [B, Y, X, C] of tokens."""
    size = record.image_size
    return palette.decode(tokens_BT, record.palette_VC).reshape(-1, size, size, 3)


def _save_grid(path: Any, images_BYXC: np.ndarray, columns: int) -> None:
    if jax.process_index() == 0:
        scale = max(1, 96 // images_BYXC.shape[1])
        save_png(path, image_grid(images_BYXC, columns, scale, gap=max(2, scale // 2)))
