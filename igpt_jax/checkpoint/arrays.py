"""Arrays of a checkpoint step: partial restores, each array checked against its checksum."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from igpt_jax.checkpoint import orbax_s3
from igpt_jax.checkpoint.metadata import Metadata
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.parallel import checksums
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)


@functools.cache
def prepare_orbax() -> None:
    """Teaches Orbax s3:// paths, and keeps its stack traces of failed saves out of the log: we log them in one line."""
    orbax_s3.teach()
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def quiet_saves() -> ocp.Context:
    """For saving. Where the folders of a step cannot be made, Orbax's threads wait five minutes for them and hold their
    copies of the arrays as long. So one process makes them first; several would wait for the one that failed."""
    prepare_orbax()
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = jax.process_count() > 1
    return context


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return state["params"], {name: value for name, value in state.items() if name != "params"}


def barrier(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def float64_enabled(needed: bool) -> Iterator[None]:
    """Lets 64-bit types be read, in Orbax's threads too: `jax.enable_x64` holds for one thread only."""
    former = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", former or needed)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", former)


def load_arrays(folder: Any, step: int, trees: dict[str, Any], record: Metadata) -> dict[str, Any]:
    """The arrays of a step, in the shardings of the abstract `trees`, checked. Raises Damaged, on all processes."""
    prepare_orbax()
    path, problem, loaded, hashed = step_path(folder, step), None, {}, False
    try:
        hashed = jax.process_index() == 0 and hashes.check_hashes(path, unread={"params", "training"} - set(trees))
        try:
            loaded = ocp.load_checkpointables(path, trees)
        except Exception as error:
            # All files are what they were: then it is no damage, but no memory left, or no network.
            if hashed or isinstance(error, OSError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise Damaged(f"it cannot be read: {next(iter(str(error).splitlines()), repr(error))}") from error
    except Damaged as damage:
        problem = str(damage)
    if jax.process_count() > 1:
        bad_P = multihost_utils.process_allgather(np.int32(problem is not None))
        problem = problem or (f"process {bad_P.argmax()} says so" if bad_P.any() else None)
    if not problem and record.checksums:
        state = {name: tree for name, tree in loaded.items() if name != "training"} | loaded.get("training", {})
        if array := checksums.difference(record.checksums, checksums.of_tree(state)):
            problem = f"the array {array} is not what was saved"
    if problem:
        raise Damaged(problem)
    if not record.checksums:
        log.warning("Checkpoint %s has no checksums of its arrays: %s.", path,
                    "its files alone are as they were written" if hashed else "it is used as it is")
    return loaded


def partial_load() -> ocp.Context:
    """For reading: parameters that are not asked for are left out."""
    prepare_orbax()
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    return context
