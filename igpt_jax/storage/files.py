"""Reading and atomic writing of whole files."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from igpt_jax.storage.paths import encoded, is_local, readable

TEMPORARY = ".tmp"  # suffix of files that `publish` has not finished
REQUESTS = 32  # threads; in a bucket a small read takes tens of milliseconds


def read(path: epath.Path) -> bytes:
    """The content of a file.

    Raises:
      UserError: the file is missing or cannot be read.
    """
    with readable(path):
        return path.read_bytes()


def concurrently(function: Callable[[Any], Any], items: Iterable[Any], threads: int = REQUESTS) -> list[Any]:
    """`function` of each item, in order, computed by threads: fewer than REQUESTS where each holds a large file."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def publish(path: epath.Path, data: bytes | str) -> None:
    """Writes a file atomically: a reader sees the old content or the new one. Creates the folder if needed."""
    data = encoded(data) if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)  # atomic in a bucket
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read. The umask can only be read by setting it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # interrupted after the replacement
            os.unlink(temporary)
        raise


def sweep(workdir: epath.Path) -> None:
    """Removes the temporary files of a killed `publish` from a workdir and its folders, but not from other workdirs in
    it. Call it with the workdir's lock held, so that no other job is writing."""
    if is_local(workdir):  # a bucket has no temporary files
        own = (child for child in workdir.iterdir() if child.is_dir() and not (child / "config.json").exists())
        for folder in (workdir, *own):
            for file in folder.glob(f".*.????????{TEMPORARY}"):
                file.unlink(missing_ok=True)
