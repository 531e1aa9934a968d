"""Verifies checkpoints or a pixel store against their checksums, and changes nothing in them.

- Checkpoints: the CRC of the metadata, the SHA-256 of every file, the checksum of every array.
- Store: the SHA-256 of every file.

Writes verify.json with a row for each. The exit code is 2 if anything is damaged.
"""

import time
from typing import Any

import jax

from igpt_jax import checkpoint, storage
from igpt_jax.config import MeshConfig, UserError, VerifyConfig
from igpt_jax.data import store
from igpt_jax.metrics.logging import say
from igpt_jax.parallel import sharding
from igpt_jax.runtime.exits import Ended
from igpt_jax.storage import side_files, to_json


def run(config: VerifyConfig, workdir: str) -> dict[str, Any]:
    """Returns the number `checked`, the paths `damaged`, and the speed `mb_per_second`.

    Raises:
      UserError: there is nothing to verify at `path`.
      Ended: something is damaged.
    """
    if not config.path:
        raise UserError("path is empty. Set --config.path to a pixel store, a workdir of pretrain or one step of it.")
    path = storage.path(config.path)
    start = time.perf_counter()
    if (path / "manifest.json").exists():
        rows = [{"path": str(path), **_verify_store(config.path)}]
    else:
        rows = [{"path": str(storage.path(folder) / str(step)), **checkpoint.verify(folder, step, _mesh())}
                for folder, step in _steps(config.path)]
        for row in [row for row in rows if row["problem"] and not checkpoint.is_checkpoint(row["path"])]:
            say(f"{row['path']}: its run has removed it in the meantime; skipped")
            rows.remove(row)
    seconds = time.perf_counter() - start
    for row in rows:
        say(f"{row['path']}: {row['problem'] or 'undamaged'}")
    if jax.process_index() == 0:
        side_files.no_longer_done(storage.path(workdir))
        storage.publish(storage.path(workdir) / "verify.json", to_json(rows))
    damaged = [row["path"] for row in rows if row["problem"]]
    size = sum(row.get("bytes") or 0 for row in rows)
    metrics = {"checked": len(rows), "damaged": damaged, "mb_per_second": size / 1e6 / seconds}
    if damaged:
        raise Ended(f"{len(damaged)} of {len(rows)} are damaged: {', '.join(damaged)}.", metrics)
    return metrics


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig())


def _steps(path: str) -> list[tuple[str, int]]:
    """(directory of steps, step) of one step, or of all steps of a workdir."""
    folder, steps = checkpoint.steps_of(path)
    return [(folder, step) for step in steps]


def _verify_store(path: str) -> dict[str, Any]:
    """Compares all files of a store with its manifest. Returns `problem` (None if there is none) and `bytes`."""
    try:
        opened = store.Store.open(path)
        store.verify(opened.path, opened.manifest)
        return {"problem": None, "bytes": sum(size for size, _ in opened.manifest["files"].values())}
    except UserError as error:
        if storage.unreachable(error):
            raise
        return {"problem": str(error), "bytes": 0}
