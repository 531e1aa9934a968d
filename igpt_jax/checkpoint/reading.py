"""Reads checkpoints for other jobs: finds a step, reads its metadata, loads its parameters.

`checkpoint` names either a workdir of a training job, which stands for its newest good step, or one step of it,
DIR/checkpoints/STEP.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from igpt_jax import storage
from igpt_jax.checkpoint import step_folders
from igpt_jax.checkpoint.arrays import (
    AbstractOf,
    float64_enabled,
    from_process_0,
    load_arrays,
    load_state,
    metadata_for_all,
    partial_load_context,
)
from igpt_jax.checkpoint.metadata import METADATA_FILE, Metadata, read_metadata, require_parameters
from igpt_jax.checkpoint.step_folders import NUMBER, directory_of_steps, is_step, step_path, steps_in
from igpt_jax.config import UserError
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import checksums, sharding
from igpt_jax.parallel.trees import by_name
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)

T = TypeVar("T")


class NoGoodCheckpoint(UserError):
    """A checkpoint is damaged and has no older step to use instead, or its weights are not finite."""


def steps_of(checkpoint: str) -> tuple[str, list[int]]:
    """The finished steps that `checkpoint` names: all of a workdir, or the one step.

    Args:
      checkpoint: a workdir, its directory of steps, or one step.

    Returns:
      (directory of steps, its steps ascending; at least one)

    Raises:
      UserError: there is no finished step, or the step's folder is not named by its number.
    """
    if not checkpoint:
        raise UserError("checkpoint is empty. Give a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    path = storage.path(checkpoint)
    storage.absolute(path)  # raises UserError for a path that cannot be read
    if is_step(path):
        path = step_folders.resolved(path)
        if not NUMBER.fullmatch(path.name):
            raise UserError(f"checkpoint {checkpoint!r} is a step in a folder of another name. Rename the folder to "
                            "the number of its step.")
        return str(path.parent), [int(path.name)]
    folder = directory_of_steps(path)
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"checkpoint {checkpoint!r} holds no checkpoint. "
                        "Give a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    return str(folder), steps


def locate(checkpoint: str) -> tuple[str, int]:
    """(directory of steps, step) that `checkpoint` names; of a workdir, the newest step. Raises UserError."""
    folder, steps = steps_of(checkpoint)
    return folder, steps[-1]


def is_checkpoint(checkpoint: str) -> bool:
    """Whether `checkpoint` names a finished step."""
    try:
        return bool(locate(checkpoint))
    except UserError:
        return False


def load_metadata(checkpoint: str) -> Metadata:
    """The metadata of `checkpoint`. Raises UserError if there is no checkpoint or no good one."""
    return _newest_good(checkpoint, read_metadata)


def identity(checkpoint: str, parameters: str = "raw") -> str:
    """A digest of a step's metadata and arrays: two steps with the same identity hold the same parameters.

    Args:
      checkpoint: a workdir, or one step of it.
      parameters: raw, or ema: their moving average.

    Raises:
      UserError: there is no checkpoint.
    """
    path = step_path(*locate(checkpoint))
    data = storage.read(path / METADATA_FILE)
    # The metadata holds the checksums of the arrays. In the old format without them, the file hashes take their place.
    if not load_metadata(checkpoint).checksums and (path / hashes.HASHES).exists():
        data += storage.read(path / hashes.HASHES)
    return hashlib.sha256(data + (parameters.encode() if parameters != "raw" else b"")).hexdigest()[:16]


def load_model(checkpoint: str, mesh: Mesh, precision: str, attention: str = "auto", parameters: str = "raw",
               options: str = "") -> tuple[Model, dict[str, Any], Metadata]:
    """Loads a checkpoint's parameters straight into `mesh`, without the rest of its training state.

    Args:
      checkpoint: a workdir (its newest good step), or one step of it.
      mesh: where the parameters go, by the same sharding rules as in training.
      precision: of the computation; the parameters are float32, or float64 at precision float64.
      attention: the attention back-end, whichever one the training used.
      parameters: raw, or ema: their moving average.
      options: the job's `compiler_options`, whichever ones the training used.

    Returns:
      (model, parameters, metadata)

    Raises:
      UserError: there is no checkpoint, it is damaged, its weights are not finite, or it holds no moving average.
    """
    def load(folder: str, step: int) -> tuple[Model, dict[str, Any], Metadata]:
        metadata = metadata_for_all(folder, step)
        require_parameters(metadata, parameters, checkpoint)

        def model_for(precision: str) -> Model:
            return Model.of(metadata.config, metadata.codec.vocabulary, metadata.image_size, mesh, metadata.classes,
                            precision, attention, options)

        # Loaded in the dtype in which they were saved, since their checksums hold for that dtype. Then cast.
        with float64_enabled(metadata.config.precision == "float64"):
            abstract = model_for(metadata.config.precision).abstract_parameters()
            abstract = jax.tree.map(lambda leaf, on: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on),
                                    abstract, sharding.parameter_shardings(abstract, mesh))
            with partial_load_context():  # parameters that the model does not use, such as a class head, are skipped
                if parameters == "raw":
                    params = load_arrays(folder, step, {"params": abstract}, metadata)["params"]
                else:
                    params = load_arrays(folder, step, {"training": {"ema": abstract}}, metadata)["training"]["ema"]
        model = model_for(precision)
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, model.abstract_parameters())
        if arrays := checksums.not_finite(params):
            raise NoGoodCheckpoint(f"checkpoint {step_path(folder, step)}: its weights are not finite (NaN or infinity "
                           f"in {arrays[0]}, {len(arrays)} of {len(by_name(params))} arrays). The training that "
                           "saved them diverged. Name an earlier step (DIR/checkpoints/STEP).")
        return model, params, metadata

    return _newest_good(checkpoint, load, for_all=True)


def branch(checkpoint: str, abstract_of: AbstractOf, metadata: Metadata) -> tuple[dict[str, Any], Metadata]:
    """The whole training state of another run's step, for a run that continues it with another schedule.

    Args:
      checkpoint: a step of the other run, the trunk, or its workdir.
      abstract_of: the state of a run with a config, as abstract arrays with the shardings to load into.
      metadata: describes the run that branches.

    Returns:
      (state, metadata of the step)

    Raises:
      UserError: there is no good checkpoint; or the runs differ in more than their schedules after that step.
    """
    def load(folder: str, step: int) -> tuple[dict[str, Any], Metadata]:
        stored, ours = metadata_for_all(folder, step), metadata.config
        if stored.config.job != ours.job:
            raise UserError(f"branch_from={checkpoint} is a checkpoint of the job {stored.config.job}, not {ours.job}. "
                            f"Branch from one of {ours.job}; to fine-tune, set checkpoint.")
        trunk = dataclasses.replace(stored, config=dataclasses.replace(stored.config, branch_from=ours.branch_from))
        changes = trunk.check_resumable(metadata, checkpoint)
        return (load_state(folder, step, abstract_of, metadata, stored),
                dataclasses.replace(stored, changes=(*stored.changes, *changes)))

    return _newest_good(checkpoint, load, for_all=True)


def _newest_good(checkpoint: str, read: Callable[[str, int], T], for_all: bool = False) -> T:
    """`read(folder, step)` of the newest step of `checkpoint` for which it does not raise Damaged.

    With `for_all`, all processes call it together and take process 0's steps.
    """
    folder, steps = from_process_0(lambda: steps_of(checkpoint)) if for_all else steps_of(checkpoint)
    for step in reversed(steps):
        try:
            return read(folder, step)
        except Damaged as damage:
            problem = f"checkpoint {step_path(folder, step)} is damaged: {damage}"
            if step != steps[0]:
                log.error("%s. An older one is used.", problem)
        except FileNotFoundError:
            if for_all and jax.process_count() > 1:  # perhaps on this process alone, which must not wait for the others
                raise
            problem = f"checkpoint {step_path(folder, step)} was removed by its run while it was read"
    raise NoGoodCheckpoint(f"{problem}. Name another step.")
