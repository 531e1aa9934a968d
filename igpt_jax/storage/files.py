"""Reading and atomic writing of whole files."""

import os
import tempfile

from etils import epath

from igpt_jax.storage.paths import encoded, is_local, readable

TEMPORARY = ".tmp"  # ends the names of files that `publish` has not finished


def read(path: epath.Path) -> bytes:
    """The content of a file that the user named.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with readable(path):
        return path.read_bytes()


def publish(path: epath.Path, data: bytes | str) -> None:
    """Writes a file so that a reader sees its old content or its new one, never a part; makes its folder."""
    data = encoded(data) if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sweep(workdir: epath.Path) -> None:
    """Removes what a killed `publish` left in a workdir and its folders. Only the holder of its lock may."""
    if is_local(workdir):  # in a bucket nothing is left
        for folder in (workdir, *(child for child in workdir.iterdir() if child.is_dir())):
            for file in folder.glob(f".*{TEMPORARY}"):
                file.unlink(missing_ok=True)
