"""Loads the arrays of a checkpoint step and compares each with its checksum."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from igpt_jax import storage
from igpt_jax.checkpoint import orbax_s3
from igpt_jax.checkpoint.metadata import Metadata, read_metadata
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.parallel import checksums
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)

AbstractOf = Callable[[PretrainConfig], dict[str, Any]]  # the state of a run as abstract arrays, with its shardings


@functools.cache
def prepare_orbax() -> None:
    """Adds s3:// support to Orbax and hides its stack traces. Call it before any other Orbax call."""
    orbax_s3.teach()
    # Orbax logs a failed save with a stack trace of many lines; `Checkpoints` logs it in one line.
    logging.getLogger("absl").addFilter(lambda entry: "orbax" not in entry.pathname)


def save_context() -> ocp.Context:
    """Orbax options for saving: a single process creates a step's folders before it copies the arrays."""
    prepare_orbax()
    context = ocp.Context()
    # By default Orbax's threads create the folders. Where that fails they wait five minutes, and hold their copies of
    # the arrays as long. Several processes keep the default: the others would wait for the one that failed.
    context.async_options.create_directories_asynchronously = jax.process_count() > 1
    return context


def partial_load_context() -> ocp.Context:
    """Orbax options for loading some parameters of a step: those that are not requested stay on disk."""
    prepare_orbax()
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    return context


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`params`, `training`): the two trees in which a training state is stored."""
    return state["params"], {name: value for name, value in state.items() if name != "params"}


def load_state(folder: Any, step: int, abstract_of: AbstractOf, run: Metadata, metadata: Metadata) -> dict[str, Any]:
    """Loads and verifies the whole training state of a step (see `load_arrays`), for the run `run`.

    A run that begins to average its parameters at this step starts with these parameters as their average. What the run
    does not have, such as an average that it no longer keeps, is left on disk.

    Args:
      folder, step, metadata: of the step.
      abstract_of: the abstract state of a run with a config.
      run: describes the run that continues. Its optimizer may clip or decay where the step's did not, or the reverse.

    Raises:
      Damaged: as `load_arrays`.
      UserError: the run has other arrays than the step.
    """
    config = run.config
    wanted = abstract_of(config)
    same = (config.optimizer, config.model) == (metadata.config.optimizer, metadata.config.model)
    # The back-end of attention may have changed with the machine.
    model = dataclasses.replace(metadata.config.model, attention=config.model.attention)
    stored = wanted if same else abstract_of(dataclasses.replace(
        config, optimizer=metadata.config.optimizer, model=model))
    kept = {name: tree for name, tree in stored.items() if name in wanted}
    added = wanted.keys() - kept.keys()
    # `abstract_of` knows the run's images and precision only.
    other = run.sizes != metadata.sizes or _arrays(kept) != _arrays({name: wanted[name] for name in kept})
    if other or added - {"ema"}:
        raise UserError(f"the run has other arrays than the checkpoint {step_path(folder, step)}: accept_changes cannot"
                        " change codec, optimizer.second_moment, the number of classes, or the size of the model, "
                        "images or palette; switch to or from float64, or between adam and muon; nor begin with "
                        "optimizer.spike_factor. Undo that change, or give a new --workdir.")
    params, training = split_state(kept)
    with partial_load_context() if kept.keys() < stored.keys() else contextlib.nullcontext():
        trees = load_arrays(folder, step, {"params": params, "training": training}, metadata)
    state = {"params": trees["params"], **trees["training"]}
    # Clipping and weight decay are entries of the optimizer's chain that have no arrays.
    chain = jax.tree.structure(wanted["optimizer"])
    state["optimizer"] = jax.tree.unflatten(chain, jax.tree.leaves(state["optimizer"]))
    return state | {name: jax.tree.map(jnp.copy, state["params"]) for name in added}


def _arrays(state: dict[str, Any]) -> dict[str, list[tuple]]:
    """Shapes and dtypes of each tree of a state, in order."""
    return {name: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for name, tree in state.items()}


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(problem: str | None) -> str | None:
    """The problem; on all processes one that any of them found. All must call it together."""
    if jax.process_count() > 1:
        bad_P = multihost_utils.process_allgather(np.int32(problem is not None))
        problem = problem or (f"process {bad_P.argmax()} found damage" if bad_P.any() else None)
    return problem


def from_process_0(read: Callable[[], Any]) -> Any:
    """The JSON value of `read()` on process 0, on all processes. All must call it together.

    Raises Damaged or UserError on all processes where process 0 does.
    """
    found: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            found = {"value": read()}
        except Damaged as damage:
            found = {"damaged": str(damage)}
        except UserError as error:
            if storage.unreachable(error):
                raise error.__cause__ from None  # this process ends, and the others with it
            found = {"refused": str(error)}
    found = of_process_0(found)
    if "value" not in found:
        raise Damaged(found["damaged"]) if "damaged" in found else UserError(found["refused"])
    return found["value"]


def metadata_for_all(folder: Any, step: int) -> Metadata:
    """A step's metadata as process 0 reads it: a shared disk may not show the step to the others yet.

    Raises Damaged or UserError on all processes.
    """
    return Metadata.from_json(from_process_0(lambda: read_metadata(folder, step).to_json()))


def of_process_0(value: Any) -> Any:
    """The JSON value of process 0, on all processes. All must call it together."""
    if jax.process_count() == 1:
        return value
    data = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    row = np.frombuffer(data, np.uint8) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(row), np.uint8)))


@contextlib.contextmanager
def float64_enabled(needed: bool) -> Iterator[None]:
    """Enables 64-bit types if `needed`, in Orbax's threads too; `jax.enable_x64` covers the calling thread only."""
    former = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", former or needed)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", former)


def load_arrays(folder: Any, step: int, trees: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Loads and verifies the arrays of a step. All processes must call it together.

    Args:
      folder: the directory of steps.
      step: the step to load.
      trees: `params`, `training` or both, as abstract arrays with the shardings to load into.
      metadata: the step's metadata, with the checksums to compare.

    Returns:
      `trees` with arrays.

    Raises:
      Damaged: a file or an array differs from what was saved. Every process raises it if any process found damage.
    """
    prepare_orbax()
    path, problem, loaded, hashed = step_path(folder, step), None, {}, False
    try:
        hashed = jax.process_index() == 0 and hashes.check_hashes(path, unread={"params", "training"} - set(trees))
        try:
            loaded = ocp.load_checkpointables(path, trees)
        except Exception as error:
            # Where the files have their hashes, nothing is damaged: memory, the network or the credentials failed.
            if hashed or isinstance(error, OSError | MemoryError) or storage.unreachable(error):
                raise
            raise Damaged(f"it cannot be read: {next(iter(str(error).splitlines()), repr(error))}") from error
    except Damaged as damage:
        problem = str(damage)
    # Comparing checksums is a collective. A process that found damage skips it, so all must agree to skip it first.
    problem = agreed(problem)
    if not problem and metadata.checksums:
        state = {name: tree for name, tree in loaded.items() if name != "training"} | loaded.get("training", {})
        if array := checksums.difference(metadata.checksums, checksums.of_tree(state)):
            problem = f"the array {array} is not what was saved"
    if problem:
        raise Damaged(problem)
    if not metadata.checksums:
        log.warning("Checkpoint %s has no array checksums: %s.", path,
                    "only the hashes of its files were verified" if hashed else "it is used without verification")
    return loaded
