"""Verification of a whole checkpoint step: file hashes, metadata, checksums of all arrays."""

import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from igpt_jax import storage
from igpt_jax.checkpoint.arrays import float64_enabled, load_arrays, prepare_orbax
from igpt_jax.checkpoint.metadata import later_metrics, read_metadata
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged


def verify(typed: str, step: int, mesh: Mesh) -> dict[str, Any]:
    """Reads a whole step, compares all that it can be compared with, and leaves it where it is.

    Args:
      typed: the directory of steps.
      step: to read.
      mesh: its devices hold the arrays, split wherever they divide.

    Returns:
      `problem`: None, or what is damaged; `bytes` of its files; `arrays` compared; and the seconds that both took,
      `hash_seconds` and `array_seconds`.
    """
    path, found = step_path(typed, step), {"problem": None, "arrays": 0, "hash_seconds": 0.0, "array_seconds": 0.0}
    everywhere = tuple(mesh.axis_names)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        dim = next((dim for dim, size in enumerate(leaf.shape) if size % mesh.size == 0 and size), None)
        spec = PartitionSpec(*(everywhere if d == dim else None for d in range(len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    prepare_orbax()
    try:
        record = read_metadata(typed, step)
        later_metrics(path)
        start = time.perf_counter()
        hashes.check_hashes(path)
        found["hash_seconds"] = time.perf_counter() - start
        files = hashes.files_of(path) if storage.is_local(path) else None
        found["bytes"] = files and sum((path / file).stat().length for file in files)
        try:
            with float64_enabled(True):
                trees = ocp.checkpointables_metadata(path).metadata
                trees = jax.tree.map(place, {name: trees[name] for name in ("params", "training") if name in trees})
                start = time.perf_counter()
                load_arrays(typed, step, trees, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its metadata cannot be read: {error}") from None
        found["array_seconds"] = time.perf_counter() - start
        found["arrays"] = len(record.checksums)
    except Damaged as damage:
        found["problem"] = str(damage)
    return found
