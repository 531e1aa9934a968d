"""Unconditional samples, and completions of given pictures: the first rows stay, the model goes on from there.

Writes figures/samples.png, figures/completions.png (original, what was given, completions) and samples.npz.
"""

import io
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from igpt_jax import checkpoint, palette, sharding, storage, telemetry
from igpt_jax.config import SampleConfig, UserError
from igpt_jax.data import open_split, process_rows, put, tokens_of
from igpt_jax.decode import Sampling, generate

UNKNOWN = 127  # grey level of the pixels that the model was not given


def run(config: SampleConfig, workdir: str) -> dict[str, Any]:
    """Samples. Returns `images_per_second` (compilation included, once per kind) and how many of each kind.

    Raises:
      UserError: the checkpoint is missing, the data does not fit it, or nothing was asked for.
    """
    mesh = sharding.make_mesh(config.mesh)
    model, params, record = checkpoint.load_model(config.checkpoint, mesh, config.precision)
    size, table = record.image_size, palette.lookup_table(record.palette_VC)
    rows = size // 2 if config.rows < 0 else config.rows
    if rows > size:
        raise UserError(f"rows={rows} exceeds the model's {size} rows. Choose 0 to {size}.")
    store = config.data.store or record.config.data.store
    split = open_split(store, config.data.split, size) if config.images else None
    if not (config.count or split):
        raise UserError("nothing to sample: count=0 and images=0. Set one of them.")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    figures, arrays, images = storage.path(workdir) / "figures", {}, 0
    start = time.perf_counter()

    if config.count:
        nothing = np.zeros((config.count, 0), np.int32)
        arrays["samples"] = _generate(model, params, nothing, config, mesh, sampling, "samples")
        images += config.count
        grid = palette.decode(arrays["samples"], record.palette_VC).reshape(-1, size, size, 3)
        _save_grid(figures / "samples.png", grid, math.isqrt(config.count - 1) + 1)

    if split:
        count = min(config.images, split.count)
        originals = tokens_of(split, table, np.arange(count)).astype(np.int32)
        given = originals[:, :rows * size].repeat(config.completions, axis=0)
        completed = _generate(model, params, given, config, mesh, sampling, "completions")
        images += len(completed)
        arrays |= {"originals": originals, "completions": completed.reshape(count, config.completions, -1)}
        columns = _pictures(arrays["originals"][:, None], record, size), _pictures(arrays["completions"], record, size)
        known = columns[0].copy()
        known[:, :, rows:] = UNKNOWN
        grid = np.concatenate([columns[0], known, columns[1]], axis=1)
        _save_grid(figures / "completions.png", grid.reshape(-1, size, size, 3), grid.shape[1])

    seconds = time.perf_counter() - start
    if jax.process_index() == 0:
        file = io.BytesIO()
        np.savez_compressed(file, palette=record.palette_VC, **arrays)
        storage.publish(storage.path(workdir) / "samples.npz", file.getvalue())
    return {"images_per_second": images / seconds, "samples": config.count, "completions": images - config.count}


def _generate(model: Any, params: Any, given_BP: np.ndarray, config: SampleConfig, mesh: Mesh, sampling: Sampling,
              what: str) -> np.ndarray:
    """Tokens [B, T] after `given_BP`, batch by batch. Image i draws from the seed folded with its kind and with i."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(config.batch_size, len(given_BP)) // parts) * parts
    place = sharding.batch_sharding(mesh)
    mine = process_rows(place, batch_size)
    kind = jax.random.fold_in(jax.random.key(config.seed), ["samples", "completions"].index(what))

    def run(params, given_BP, index_B):
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(kind, index_B)
        return generate(model, params, given_BP, keys_B, sampling)

    run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    out = []
    with jax.set_mesh(mesh), tqdm(total=len(given_BP), unit="image", desc=what, disable=None) as bar:
        for start in range(0, len(given_BP), batch_size):
            index_B = np.arange(start, start + batch_size)  # those past the end are drawn and dropped
            batch = given_BP[index_B % len(given_BP)]
            arguments = (put(whole[mine], place, batch_size) for whole in (batch, index_B.astype(np.int32)))
            out.append(np.asarray(run(params, *arguments)))
            bar.update(min(batch_size, len(given_BP) - start))
    return np.concatenate(out)[:len(given_BP)]


def _pictures(tokens_BNT: np.ndarray, record: checkpoint.Record, size: int) -> np.ndarray:
    """RGB uint8 [B, N, Y, X, C] of tokens."""
    return palette.decode(tokens_BNT, record.palette_VC).reshape(*tokens_BNT.shape[:2], size, size, 3)


def _save_grid(path: Any, images_BYXC: np.ndarray, columns: int) -> None:
    if jax.process_index() == 0:
        scale = max(1, 96 // images_BYXC.shape[1])
        telemetry.save_png(path, telemetry.image_grid(images_BYXC, columns, scale, gap=max(2, scale // 2)))
