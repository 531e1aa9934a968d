"""Holds checkpoints or a pixel store against their checksums; changes nothing in them.

Of each checkpoint: the CRC of its record, the SHA-256 of its files, the checksums of its arrays. Of a store: the
SHA-256 of its files. Writes verify.json, a row for each; exit code 2 where anything is damaged.
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
from igpt_jax.storage import to_json


def run(config: VerifyConfig, workdir: str) -> dict[str, Any]:
    """Returns how many were `checked`, which are `damaged`, and the speed in MB/s, `mb_per_second`.

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
    seconds = time.perf_counter() - start
    for row in rows:
        say(f"{row['path']}: {row['problem'] or 'as it was written'}")
    if jax.process_index() == 0:
        storage.publish(storage.path(workdir) / "verify.json", to_json(rows))
    damaged = [row["path"] for row in rows if row["problem"]]
    size = sum(row.get("bytes") or 0 for row in rows)
    metrics = {"checked": len(rows), "damaged": damaged, "mb_per_second": size / 1e6 / seconds}
    if damaged:
        raise Ended(f"{len(damaged)} of {len(rows)} are damaged: {', '.join(damaged)}.", metrics)
    return metrics


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig())


def _steps(typed: str) -> list[tuple[str, int]]:
    """The step that was typed, or all of a workdir."""
    folder, steps = checkpoint.steps_of(typed)
    return [(folder, step) for step in steps]


def _verify_store(typed: str) -> dict[str, Any]:
    """All files of a store against its manifest."""
    try:
        opened = store.Store.open(typed)
        store.verify(opened.path, opened.manifest)
        return {"problem": None, "bytes": sum(size for size, _ in opened.manifest["files"].values())}
    except UserError as error:
        return {"problem": str(error), "bytes": 0}
