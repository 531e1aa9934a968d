"""Checkpoints as other jobs read them: find a step, read its metadata, load its parameters."""

import hashlib
import logging
from typing import Any

import jax
from jax.sharding import Mesh

from igpt_jax import storage
from igpt_jax.checkpoint import step_folders
from igpt_jax.checkpoint.arrays import float64_enabled, load_arrays, partial_load
from igpt_jax.checkpoint.metadata import RECORD, Metadata, read_metadata
from igpt_jax.checkpoint.step_folders import NUMBER, directory_of_steps, is_step, step_path, steps_in
from igpt_jax.config import UserError
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import checksums, sharding
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)


class NoGoodCheckpoint(UserError):
    """What was named as a checkpoint is damaged, and there is no other step to use in its place; or not finite."""


# For other jobs.

def steps_of(typed: str) -> tuple[str, list[int]]:
    """(directory of steps, steps ascending) of a workdir, of such a directory, or of one step. Raises UserError."""
    if not typed:
        raise UserError("checkpoint is empty. Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    path = storage.path(typed)
    storage.absolute(path)  # refuses what cannot be read
    if is_step(path):
        path = step_folders.resolved(path)
        if not NUMBER.fullmatch(path.name):
            raise UserError(f"checkpoint {typed!r} is a step in a folder of another name. Rename it to its number.")
        return str(path.parent), [int(path.name)]
    folder = directory_of_steps(path)
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"checkpoint {typed!r} holds no checkpoint. "
                        "Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    return str(folder), steps


def locate(typed: str) -> tuple[str, int]:
    """(directory of steps, step) of a workdir (its newest step) or of one step of it. Raises UserError."""
    folder, steps = steps_of(typed)
    return folder, steps[-1]


def is_checkpoint(typed: str) -> bool:
    """Whether `locate` finds a finished step."""
    try:
        return bool(locate(typed))
    except UserError:
        return False


def load_metadata(typed: str) -> Metadata:
    """What the checkpoint `typed` says of itself. Raises UserError where there is none."""
    return _newest_good(typed, read_metadata)


def identity(typed: str) -> str:
    """A digest that changes with any parameter of the step `typed`. Raises UserError where it is none.

    The record holds the arrays' checksums; of a checkpoint without these, SHA256SUMS stands for its arrays.
    """
    path = step_path(*locate(typed))
    data = storage.read(path / RECORD)
    if not load_metadata(typed).checksums and (path / hashes.HASHES).exists():
        data += storage.read(path / hashes.HASHES)
    return hashlib.sha256(data).hexdigest()[:16]


def load_model(typed: str, mesh: Mesh, precision: str, attention: str = "auto"
               ) -> tuple[Model, dict[str, Any], Metadata]:
    """The model of a checkpoint with its parameters alone, read straight into `mesh`, and the checkpoint's record.

    Args:
      typed: a workdir of pretrain (its newest good step), or one step of it.
      mesh: where the parameters go, by the same rules as in training.
      precision: of the computation; parameters come as float32 (float64 in that mode).
      attention: the back-end, whatever the training used.

    Raises:
      UserError: no checkpoint there, or none that is what was written; or its weights are not finite.
    """
    def load(folder: str, step: int) -> tuple[Model, dict[str, Any], Metadata]:
        record = read_metadata(folder, step)

        def model_for(precision: str) -> Model:
            return Model.of(record.config, len(record.palette_VC), record.image_size, mesh, record.classes, precision,
                            attention)

        # Checked in the dtype in which they were saved: what they are cast to has another checksum.
        with float64_enabled(record.config.precision == "float64"):
            abstract = model_for(record.config.precision).abstract_parameters()
            abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                                    abstract, sharding.parameter_shardings(abstract, mesh))
            with partial_load():  # what the model has no place for, such as a class head, stays on disk
                params = load_arrays(folder, step, {"params": abstract}, record)["params"]
        model = model_for(precision)
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, model.abstract_parameters())
        if arrays := checksums.not_finite(params):
            raise NoGoodCheckpoint(f"checkpoint {step_path(folder, step)}: its weights are not finite (NaN or infinity "
                           f"in {arrays[0]}, {len(arrays)} of {len(checksums.flat(params))} arrays). The training that "
                           "saved them diverged. Name an earlier step (DIR/checkpoints/STEP).")
        return model, params, record

    return _newest_good(typed, load)


def _newest_good(typed: str, read: Any) -> Any:
    """`read(folder, step)` of the checkpoint `typed`; where that is a workdir, of its newest step that is good."""
    folder, steps = steps_of(typed)
    for step in reversed(steps):
        try:
            return read(folder, step)
        except Damaged as damage:
            problem = f"checkpoint {step_path(folder, step)} is damaged: {damage}"
            if step != steps[0]:
                log.error("%s. An older one is used.", problem)
    raise NoGoodCheckpoint(f"{problem}. Name another step.")
