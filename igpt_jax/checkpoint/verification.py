"""Verifies a whole checkpoint step: file hashes, metadata, checksums of all arrays."""

import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from igpt_jax import storage
from igpt_jax.checkpoint.arrays import float64_enabled, load_arrays, prepare_orbax
from igpt_jax.checkpoint.metadata import later_evaluation, read_metadata
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged


def verify(folder: str, step: int, mesh: Mesh) -> dict[str, Any]:
    """Reads a whole step and compares it with all its checksums. Changes nothing.

    Args:
      folder: the directory of steps.
      step: the step to verify.
      mesh: the devices that hold the arrays, sharded over all of them where a dim divides.

    Returns:
      `problem`: None, or what is damaged; `bytes` of its files (None in a bucket); `arrays` compared; and the time
      taken, `hash_seconds` and `array_seconds`.
    """
    path, found = step_path(folder, step), {"problem": None, "arrays": 0, "hash_seconds": 0.0, "array_seconds": 0.0}
    all_axes = tuple(mesh.axis_names)

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        # Checksums do not depend on the sharding. The first dim that divides over all devices is split, to save memory.
        dim = next((dim for dim, size in enumerate(leaf.shape) if size % mesh.size == 0 and size), None)
        spec = PartitionSpec(*(all_axes if d == dim else None for d in range(len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    prepare_orbax()
    try:
        metadata = read_metadata(folder, step)
        later_evaluation(path)  # raises Damaged; `read_metadata` only logs it
        start = time.perf_counter()
        hashes.check_hashes(path)
        found["hash_seconds"] = time.perf_counter() - start
        files = hashes.files_of(path) if storage.is_local(path) else None
        found["bytes"] = files and sum((path / file).stat().length for file in files)
        try:
            with float64_enabled(True):
                trees = ocp.checkpointables_metadata(path).metadata
                trees = jax.tree.map(abstract, {name: trees[name] for name in ("params", "training") if name in trees})
                start = time.perf_counter()
                load_arrays(folder, step, trees, metadata)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if storage.unreachable(error):
                raise
            raise Damaged(f"its metadata cannot be read: {error}") from None
        found["array_seconds"] = time.perf_counter() - start
        found["arrays"] = len(metadata.checksums)
    except Damaged as damage:
        found["problem"] = str(damage)
    except OSError as error:  # other steps may still be read
        if storage.unreachable(error):
            raise
        found["problem"] = f"it cannot be read: {error}"
    return found
