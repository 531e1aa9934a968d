"""A copy of a pixel store on this machine's own disk, made once and checked byte by byte."""

import concurrent.futures
import fcntl
import hashlib
import os

from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import store

COPIERS = 8  # threads; each holds one file


def stage(source: str, folder: str) -> str:
    """Copies the store `source` to `folder`/FINGERPRINT, unless it is there, and returns that path.

    Several processes of a machine may call it at once: one copies, the others wait.

    Raises:
      UserError: no store, a file that differs from its manifest, or `folder` cannot hold it.
    """
    where = storage.path(source)
    manifest = store.load_manifest(where)
    if manifest is None:
        raise UserError(f"data.stage: {source} is not a finished pixel store. Give a workdir of the prepare job.")
    if not storage.is_local(storage.path(folder)):
        raise UserError(f"data.stage={folder} must be a folder of this machine.")
    target = storage.path(folder) / manifest["fingerprint"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / store.MANIFEST).exists():
                _copy(where, target, manifest)
    except OSError as error:
        raise UserError(f"data.stage={folder}: {error.strerror or error}. Give a folder with room for the store, or "
                        "none.") from None
    return os.fspath(target)


def _copy(where: epath.Path, target: epath.Path, manifest: dict) -> None:
    def copy(name: str) -> None:
        data = storage.read(where / name)
        if [len(data), hashlib.sha256(data).hexdigest()] != manifest["files"][name]:
            raise UserError(f"pixel store {where}: {name} differs from its SHA-256. Restore the store from a copy, or "
                            "prepare it again.")
        storage.publish(target / name, data)

    with concurrent.futures.ThreadPoolExecutor(COPIERS) as pool:
        for _ in pool.map(copy, store.files_in(manifest)):
            pass
    for name in (store.PALETTE, store.MANIFEST):  # the manifest last: it says that all is there
        storage.publish(target / name, storage.read(where / name))
