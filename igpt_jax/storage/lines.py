"""Files that grow line by line (metrics.jsonl), on a disk or in a bucket."""

import contextlib
import glob
import os
import time

from etils import epath

from igpt_jax.config import UserError
from igpt_jax.storage.files import publish, read
from igpt_jax.storage.paths import encoded, is_local

PART_SECONDS = 60.0  # least time between two parts in a bucket
PENDING_BYTES = 2**24  # of lines kept in memory while the disk is full; further lines are dropped


class LineWriter:
    """Appends lines of text to a file, over any number of runs.

    On a local disk each line is written at once. A bucket cannot append, so lines are collected there and written as
    numbered parts (`metrics-00001.jsonl` for `metrics.jsonl`): at most one a minute, and on `flush` and `close`.
    `read_lines` reads both. If writing fails, `error` holds the exception, and the next call tries again.
    """

    def __init__(self, path: epath.Path):
        self.error: Exception | None = None
        self._path = path
        self._pending = bytearray()
        self._flushed = time.monotonic()
        self._file = None
        if is_local(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = open(path, "ab", buffering=0)
            if torn:  # a killed run can leave a partial line: end it, so that the next one is not appended to it
                self._pending += b"\n"
        else:
            numbers = [int(part.stem.rpartition("-")[2]) for part in _parts(path)]
            self._next_part = max(numbers, default=0) + 1

    def write(self, line: str) -> None:
        """Appends one line, given without its newline."""
        if len(self._pending) < PENDING_BYTES:
            self._pending += encoded(line) + b"\n"
        if self._file or time.monotonic() - self._flushed >= PART_SECONDS:
            self._write_out()

    def flush(self) -> None:
        """Writes all lines; on a local disk they then survive a loss of power."""
        self._write_out()
        if self._file:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes all lines and closes the file."""
        self.flush()
        if self._file:
            self._file.close()

    def _write_out(self) -> None:
        self._flushed = time.monotonic()
        try:
            # A disk that fills up may accept part of the bytes. Those are removed, so that a retry starts after them.
            while self._file and self._pending:
                del self._pending[:self._file.write(self._pending)]
            if self._pending:
                name = f"{self._path.stem}-{self._next_part:05d}{self._path.suffix}"
                publish(self._path.parent / name, bytes(self._pending))
                self._next_part += 1
                self._pending.clear()
            self.error = None
        except Exception as error:  # bucket clients raise exceptions of their own
            self.error = error


def _parts(path: epath.Path) -> list[epath.Path]:
    if not path.parent.exists():
        return []
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9][0-9][0-9][0-9][0-9]{path.suffix}"))


def read_lines(path: epath.Path) -> list[str]:
    """All lines that a `LineWriter` wrote to `path`, in order, without newlines. Damaged UTF-8 becomes U+FFFD.

    Raises:
      UserError: neither the file nor a part of it exists.
    """
    files = [path] if path.exists() else _parts(path)
    if not files:
        raise UserError(f"{path} does not exist. Check the path.")
    return [line for file in files for line in read(file).decode(errors="replace").splitlines()]
