"""Draws images from a checkpoint: samples from nothing, and completions of pictures whose first rows are given.

Writes figures/samples.png, figures/completions.png (original, given rows, completions) and samples.npz with all tokens.
Needs only a checkpoint. --config.images=FOLDER completes pictures of your own.
"""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import SampleConfig, UserError
from igpt_jax.data import open_split
from igpt_jax.data.images import SUFFIXES, Unusable, decode, read
from igpt_jax.data.token_file import tokens_of
from igpt_jax.evaluation.drawing import UNKNOWN, Drawing, default_batch_size, pairs, require_causal
from igpt_jax.metrics.figures import image_grid, save_png
from igpt_jax.metrics.logging import say
from igpt_jax.model.objectives import objective_of
from igpt_jax.parallel import sharding
from igpt_jax.storage import side_files
from igpt_jax.storage.arrays import publish_arrays

HEADINGS = ("original", "given", "completions")  # of the columns of completions.png
EXAMPLES, COUNT = 16, 64  # defaults: pictures to complete, samples


def run(config: SampleConfig, workdir: str) -> dict[str, Any]:
    """Draws all images. Returns the checkpoint's `step`, `images_per_second` (including compilation) and the numbers of
    `samples` and `completions`.

    Raises:
      UserError: the checkpoint is missing or cannot sample; the pictures or the data do not fit it; or there is nothing
        to draw.
    """
    mesh = sharding.make_mesh(config.mesh)
    trained = checkpoint.load_metadata(config.checkpoint).config
    require_causal(objective_of(trained).causal, trained, f"checkpoint {config.checkpoint}",
                   "Give a checkpoint with objective=autoregressive.")
    model, params, metadata = checkpoint.load_model(config.checkpoint, mesh, config.precision,
                                                    parameters=config.parameters, options=config.compiler_options)
    size = metadata.image_size
    rows = size // 2 if config.rows < 0 else config.rows
    if rows > size:
        raise UserError(f"rows={rows} exceeds the model's {size} rows. Choose 0 to {size}.")
    count = (0 if config.images else COUNT) if config.count < 0 else config.count
    originals_BT, names = _originals(config, metadata)
    if not (count or len(names)):
        raise UserError("nothing to sample: no images, examples=0 and count=0. Set one of them.")
    if not len(names):
        config.refuse_given("rows", "completions", why="without images to complete. Leave it out, or set images or "
                                                       "examples.")
    drawing = Drawing(model, params, mesh, f"checkpoint {config.checkpoint}", config.top_k, config.top_p,
                      config.cache_dtype or None)

    def draw(kind: str, given_BP: np.ndarray, index_B2: np.ndarray) -> np.ndarray:
        batch_size = min(config.batch_size or default_batch_size(mesh), len(given_BP))
        return drawing(kind, given_BP, index_B2, temperature=config.temperature, seed=config.seed,
                       batch_size=batch_size, progress=True)

    arrays, start = {}, time.perf_counter()
    if count:
        arrays["samples"] = draw("samples", np.zeros((count, 0), np.int32), pairs(count))
    if len(names):
        index_B2 = pairs(len(names), config.completions)
        given_BP = originals_BT[index_B2[:, 0], :rows * model.dims.row]
        completed_BT = draw("completions", given_BP, index_B2)
        arrays |= {"originals": originals_BT, "names": np.array(names),
                   "completions": completed_BT.reshape(len(names), config.completions, -1)}
    seconds = time.perf_counter() - start
    if jax.process_index() == 0:
        _publish(storage.path(workdir), config, metadata, rows, arrays)
    completions = len(names) * config.completions
    return {"step": metadata.steps_done, "images_per_second": (count + completions) / seconds, "samples": count,
            "completions": completions, "compiler_options": model.compiler_options}


def _publish(folder: storage.Path, config: SampleConfig, metadata: Metadata, rows: int, arrays: dict[str, np.ndarray]
             ) -> None:
    """Writes the figures and samples.npz. Until then a former command's files stay.

    Args:
      folder: the workdir.
      rows: given rows of each completion.
      arrays: `samples` int32 [B, T]; `originals` [B, T], `names` [B] and `completions` [B, N, T].
    """
    codec = metadata.codec
    side_files.no_longer_done(folder)
    for name in {"samples", "completions"} - arrays.keys():
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    if "samples" in arrays:
        _save_grid(folder / "figures" / "samples.png", codec.decode(arrays["samples"]),
                   math.isqrt(len(arrays["samples"]) - 1) + 1)
    if "completions" in arrays:
        original_BYXC = codec.decode(arrays["originals"])
        known_BYXC = original_BYXC.copy()
        known_BYXC[:, rows:] = UNKNOWN
        completions_BNYXC = np.stack([codec.decode(each) for each in arrays["completions"]])
        grid = np.concatenate([original_BYXC[:, None], known_BYXC[:, None], completions_BNYXC], axis=1)
        _save_grid(folder / "figures" / "completions.png", grid.reshape(-1, *original_BYXC.shape[1:]), grid.shape[1],
                   HEADINGS)
    publish_arrays(folder / "samples.npz", palette=metadata.palette_VC, codec=codec.name,
                   checkpoint=config.checkpoint, step=metadata.steps_done, **arrays)


def _originals(config: SampleConfig, metadata: Metadata) -> tuple[np.ndarray, list[str]]:
    """Tokens int32 [B, T] of the pictures to complete, and their names."""
    size, codec = metadata.image_size, metadata.codec
    none = np.zeros((0, size ** 2 * codec.channels), np.int32), []
    if config.images:
        images_BYXC, names = _users_pictures(config.images, size)
        return codec.encode(images_BYXC).astype(np.int32), names
    store = config.data.store or metadata.config.data.store
    unasked = config.examples < 0 and not config.data.store
    if config.examples == 0 or unasked and (not store or store.startswith("tfds:")):  # opening TFDS may download it
        return none
    try:
        checkpoint.store_of(metadata, config.data.store)
    except UserError as moved:
        if config.examples >= 0:
            raise
        say(f"no completions: {moved}; for pictures of your own, --config.images=FOLDER")
        return none
    split = open_split(store, config.data.split, size)
    ids = np.arange(min(EXAMPLES if config.examples < 0 else config.examples, split.count))
    return tokens_of(split, codec, ids), [f"{config.data.split} {i}" for i in ids]


def _users_pictures(paths: str, size: int) -> tuple[np.ndarray, list[str]]:
    """Reads the pictures of a folder, a file or a glob, and reports those that cannot be used.

    Returns:
      (pixels uint8 [B, Y, X, 3], names)

    Raises:
      UserError: there is no picture, or none that can be used.
    """
    files = []
    for path in storage.matching(paths):
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
        raise UserError(f"images={paths!r} holds no picture that can be used{f' ({reasons})' if reasons else ''}. "
                        f"Give JPEG, PNG or WebP files of at least {size}x{size} pixels.")
    for name, reason in unusable.items():
        say(f"left out {name}: {reason}")
    return np.stack(list(images.values())), list(images)


def _named(files: Iterable[storage.Path]) -> dict[str, storage.Path]:
    """{name: file}. Names include as many folders as it takes to make them unique."""
    files = list(dict.fromkeys(files))
    for depth in itertools.count(1):
        named = {"/".join(file.parts[-depth:]): file for file in files}
        if len(named) == len(files):
            return named


def _save_grid(path: Any, images_BYXC: np.ndarray, columns: int, headings: Sequence[str] = ()) -> None:
    """Saves images as a grid, enlarged to about 96 pixels per image."""
    scale = max(1, 96 // images_BYXC.shape[1])
    save_png(path, image_grid(images_BYXC, columns, scale, max(2, scale // 2), headings))
