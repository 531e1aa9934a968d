"""Files that grow line by line (metrics.jsonl), on a disk or in a bucket."""

import contextlib
import glob
import os
import time

from etils import epath

from igpt_jax.config import UserError
from igpt_jax.storage.files import publish, read
from igpt_jax.storage.paths import encoded, is_local

PART_SECONDS = 60.0
PENDING_BYTES = 2**24  # lines that wait for a disk that is full; further ones are dropped


class LineWriter:
    """Appends lines of text to a file, over any number of runs.

    On a local disk each line is written at once. In a bucket, where nothing can be appended, lines go to numbered
    parts beside it (`metrics-00001.jsonl` for `metrics.jsonl`), one a minute at most, and on `flush` and `close`.
    `read_lines` reads both. Where writing fails, `error` says why, and lines wait for the next call.
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
            if torn:  # a run that was killed can leave part of a line
                self._pending += b"\n"
        else:
            numbers = [int(part.stem.rpartition("-")[2]) for part in _parts(path)]
            self._next_part = max(numbers, default=0) + 1

    def write(self, line: str) -> None:
        """Appends one line; `line` comes without its newline."""
        if len(self._pending) < PENDING_BYTES:
            self._pending += encoded(line) + b"\n"
        if self._file or time.monotonic() - self._flushed >= PART_SECONDS:
            self._write_out()

    def flush(self) -> None:
        """Writes out all lines; on a local disk they then outlast even a loss of power."""
        self._write_out()
        if self._file:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()

    def _write_out(self) -> None:
        self._flushed = time.monotonic()
        try:
            while self._file and self._pending:  # a disk that fills up may take a part: the rest goes on from there
                del self._pending[:self._file.write(self._pending)]
            if self._pending:
                name = f"{self._path.stem}-{self._next_part:05d}{self._path.suffix}"
                publish(self._path.parent / name, bytes(self._pending))
                self._next_part += 1
                self._pending.clear()
            self.error = None
        except Exception as error:  # a bucket's client has errors of its own
            self.error = error


def _parts(path: epath.Path) -> list[epath.Path]:
    if not path.parent.exists():
        return []
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9][0-9][0-9][0-9][0-9]{path.suffix}"))


def read_lines(path: epath.Path) -> list[str]:
    """All lines that a `LineWriter` wrote to `path`, in order, without newlines; U+FFFD in place of damaged bytes.

    Raises:
      UserError: there is neither the file nor a part of it.
    """
    files = [path] if path.exists() else _parts(path)
    if not files:
        raise UserError(f"{path} does not exist. Check the path.")
    return [line for file in files for line in read(file).decode(errors="replace").splitlines()]
