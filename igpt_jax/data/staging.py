"""Copies a pixel store to a local disk, once, and verifies every byte."""

import fcntl
import os

from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import store

COPIERS = 8  # threads; each holds one file


def stage(source: str, folder: str) -> str:
    """Copies the store `source` to `folder`/FINGERPRINT, unless it is there already, and returns that path.

    Several processes of a machine may call this at once: one copies, the others wait.

    Raises:
      UserError: `source` is not a store, a file differs from the manifest, or `folder` is not local or cannot hold it.
    """
    where = storage.path(source)
    manifest = store.load_manifest(where)
    if manifest is None:
        raise UserError(f"data.stage: {source} is not a finished pixel store. Set data.store to a workdir of the "
                        "prepare job.")
    if not storage.is_local(storage.path(folder)):
        raise UserError(f"data.stage={folder} must be a folder of this machine. Give a local path.")
    target = storage.path(folder) / manifest["fingerprint"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / store.MANIFEST).exists():
                _copy(where, target, manifest)
    except OSError as error:
        raise UserError(f"data.stage={folder}: {error.strerror or error}. Give a folder with space for the store, or "
                        "leave data.stage empty.") from None
    return os.fspath(target)


def _copy(where: epath.Path, target: epath.Path, manifest: dict) -> None:
    def copy(name: str) -> None:
        # An interrupted copy resumes: a large store may take longer than the other processes wait.
        if (target / name).exists() and store.size_and_hash(storage.read(target / name)) == manifest["files"][name]:
            return
        data = storage.read(where / name)
        if store.size_and_hash(data) != manifest["files"][name]:
            raise store.damaged(where, name, "differs from its SHA-256")
        storage.publish(target / name, data)

    storage.concurrently(copy, store.files_in(manifest), COPIERS)
    for name in (store.PALETTE, store.MANIFEST):  # the manifest last: it marks a complete copy
        storage.publish(target / name, storage.read(where / name))
