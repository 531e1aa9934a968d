"""Paths of users, local or in a bucket (gs://, s3://), and the things that differ there. No JAX is imported here.

A bucket has no rename, no append and no locks: an object appears whole when its write ends. `publish`, `LineWriter`
and `lock` give both kinds of storage the same meaning.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath
from etils.epath import gpath

from igpt_jax import process
from igpt_jax.config import UserError

SCHEMES = ("gs://", "s3://")
LOCK = ".lock"
TEMPORARY = ".tmp"  # ends the names of files that `publish` has not finished
HEARTBEAT_SECONDS = 20.0
PART_SECONDS = 60.0
PENDING_BYTES = 2**24  # lines that wait for a disk that is full; further ones are dropped


def path(text: str | os.PathLike) -> epath.Path:
    """The path that a user typed, with ~ expanded.

    Raises:
      UserError: an empty path, or a scheme other than gs:// and s3://.
    """
    text = os.fspath(text)
    if not text:
        raise UserError("a path is empty. Give a local path, gs://BUCKET/... or s3://BUCKET/...")
    if "://" in text and not text.startswith(SCHEMES):
        raise UserError(f"path {text!r}: storage is a local path, gs:// or s3://.")
    if re.match("(gs|s3):/(?!/)", text):
        raise UserError(f"path {text!r} has one slash after its scheme. Write gs://BUCKET/... or s3://BUCKET/...")
    return _local(os.path.expanduser(text)) if "://" not in text else epath.Path(text)


def _local(text: str) -> epath.Path:
    """A path of this machine, as /../gs/... where it is /gs/..., which epath would take for gs://..."""
    return epath.Path(re.sub(r"^/+(?=(gs|s3|az|hf)(/|$))", "/../", text))


def is_local(path: epath.Path) -> bool:
    """Whether `path` lies on a file system of this machine, not in a bucket."""
    return not os.fspath(path).startswith(SCHEMES)


def absolute(path: epath.Path) -> epath.Path:
    """`path` from the root, as Orbax and TensorStore need it.

    Raises:
      UserError: TensorStore would write somewhere else. It reads `\\` as `/`, and names are UTF-8 to it.
    """
    if not is_local(path):
        return path
    whole = os.path.abspath(path)
    if "\\" in whole:
        raise UserError(f"path {whole} has a backslash, which TensorStore reads as '/'. Rename that folder.")
    try:
        alike = whole.encode() == os.fsencode(whole)
    except UnicodeEncodeError:
        alike = False
    if not alike:
        raise UserError(f"path {whole!r} is not UTF-8, as TensorStore needs it. Rename that folder"
                        + (".", ", or set LC_ALL=C.UTF-8.")[sys.getfilesystemencoding() != "utf-8"])
    return _local(whole)


def _literal_glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """`Path.glob` with the folder's own name literal: epath, and Orbax with it, took `[` in it for a pattern."""
    return _epath_glob(type(self)(glob.escape(os.fspath(self))), pattern)


_epath_glob, gpath._GPath.glob = gpath._GPath.glob, _literal_glob


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
    """Turns the errors of reading what a user named into one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a file is needed.") from None
    except (OSError, ImportError) as error:  # ImportError: the bucket's client is not installed
        raise UserError(f"{path} cannot be read: {error}") from None


def read(path: epath.Path) -> bytes:
    """The content of a file that the user named.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with _readable(path):
        return path.read_bytes()


def parse_json(data: bytes) -> Any:
    """What JSON says. Raises ValueError, where it is nested too deeply too."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def children(path: epath.Path) -> list[epath.Path]:
    """What lies in a folder that the user named, sorted by name.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with _readable(path):
        return sorted(path.iterdir(), key=lambda child: child.name)


def patterns(typed: str) -> list[str]:
    """The paths and globs of a comma list. Where a name with commas exists, they do not split it."""
    found, pieces = [], typed.split(",")
    while pieces:
        end = next((i for i, piece in enumerate(pieces) if i and "://" in piece), len(pieces))
        wholes = [",".join(pieces[:count]) for count in range(end, 1, -1)]
        whole = next((each for whole in wholes for each in (whole, whole.strip()) if _has_such_a_name(each)), pieces[0])
        del pieces[:whole.count(",") + 1]
        found.append(whole)
    return [pattern for pattern in map(str.strip, found) if pattern]


def _has_such_a_name(pattern: str) -> bool:
    """Whether `pattern` exists up to its last name with a comma."""
    before, comma, rest = pattern.rpartition(",")
    with contextlib.suppress(UserError, OSError, ImportError):
        return path(before + comma + rest.partition("/")[0]).exists()
    return False


def matching(pattern: str) -> list[epath.Path]:
    """The existing paths that a path or glob pattern of the user stands for, sorted. Each part is a pattern only where
    nothing of that very name exists.

    Raises:
      UserError: there are none.
    """
    given = path(pattern)
    found, last = [epath.Path()], len(given.parts) - 1
    with _readable(given):
        for i, part in enumerate(given.parts):
            found = [match for folder in found for match in _below(folder, part, i == last)]
    if not found:
        raise UserError(f"{pattern!r} matches nothing. Check the path.")
    return sorted(found)


def _below(folder: epath.Path, part: str, last: bool) -> list[epath.Path]:
    literal = folder / part
    if not glob.has_magic(part):
        return [literal] if not last or literal.exists() else []
    if literal.exists():
        return [literal]
    if "**" in part:
        raise UserError(f"{part!r} is no pattern here: * stands for one folder, as in 'a/*/*.png'.")
    return list(folder.glob(part))


def tensorstore_spec(path: epath.Path) -> dict[str, Any]:
    """TensorStore's key-value store of a folder. Emulators and other S3 services are named by $AWS_ENDPOINT_URL."""
    if is_local(path):
        return {"driver": "file", "path": os.path.abspath(absolute(path)) + "/"}
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, folder = rest.partition("/")
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": folder.rstrip("/") + "/"}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec


def listing(folder: epath.Path, passed_over: dict[str, str] | None = None) -> dict[str, int]:
    """The files below a folder, as their paths from there with slashes -> bytes; hidden ones (`.name`) are left out.

    Links are followed, each folder once. Of two paths to one folder in the same parent, the first by name is taken.

    Args:
      passed_over: takes up the other paths to a folder -> the path that was taken.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with _readable(folder):
        if not is_local(folder):
            found = fsspec.core.url_to_fs(os.fspath(folder))
            files = {name.removeprefix(found[1]).lstrip("/"): entry["size"]
                     for name, entry in found[0].find(found[1], detail=True).items()}
            return {name: size for name, size in files.items() if not f"/{name}".count("/.")}
        sizes, taken = {}, {os.path.realpath(folder): "."}
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            above = os.path.relpath(parent, folder)
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")
                          and not _taken(os.path.join(parent, name), os.path.join(above, name), taken, passed_over)]
            for name in (name for name in names if not name.startswith(".")):
                file = os.path.join(parent, name)
                size = os.stat(file).st_size if os.path.exists(file) else 0  # a link that leads nowhere
                sizes[os.path.relpath(file, folder).replace(os.sep, "/")] = size
        return sizes


def _raise(error: OSError) -> None:
    raise error


def _taken(folder: str, name: str, taken: dict[str, str], passed_over: dict[str, str] | None) -> bool:
    """Whether `folder`, known as `name`, was taken before by another path; else it is now."""
    name, real = os.path.normpath(name), os.path.realpath(folder)
    if first := taken.get(real):
        if passed_over is not None:
            passed_over[name] = first
        return True
    taken[real] = name
    return False


def encoded(text: str) -> bytes:
    """UTF-8; a name that is not UTF-8 shows as in Python's strings, caf\\udce9."""
    return text.encode(errors="backslashreplace")


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


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Holds `workdir` (made where missing) for one job.

    Local: an flock on `workdir/.lock`; the kernel lets go of it when its process ends, however it ends. Bucket: an
    object that its holder writes anew every 20 seconds and deletes at the end; one that stays the same for a minute,
    or whose process on this host is gone, belonged to a dead job and is taken over. No clocks are compared. A bucket
    cannot refuse the slower of two starts: should two jobs both go on, or one be taken over while it was frozen, the
    one that finds the other's lock in place of its own ends with exit code 2, within 20 seconds.

    Raises:
      UserError: another job holds it; names its host, process and start.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    with _local_lock(workdir, mine) if is_local(workdir) else _bucket_lock(workdir, mine):
        yield


def _in_use(workdir: epath.Path, text: str) -> UserError:
    try:
        holder = "host {host}, process {pid}, since {start}".format(**json.loads(text))
    except (ValueError, KeyError):
        holder = "a job that is just starting"
    return UserError(f"workdir {workdir} is in use by {holder}. Wait for it, stop it, or give another --workdir.")


@contextlib.contextmanager
def _local_lock(workdir: epath.Path, mine: dict) -> Iterator[None]:
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(workdir, file.read()) from None
        # The file stays when the job ends: deleting it would let two jobs lock two files of one name.
        file.truncate(0)
        file.write(json.dumps(mine))
        file.flush()
        yield


@contextlib.contextmanager
def _bucket_lock(workdir: epath.Path, mine: dict) -> Iterator[None]:
    file = workdir / LOCK

    def content() -> str:
        try:
            return file.read_text()
        except FileNotFoundError:
            return ""

    def beat(count: int) -> str:
        text = json.dumps({**mine, "beat": count})
        publish(file, text)
        return text

    found = content()
    if found and not _gone(found):
        time.sleep(3 * HEARTBEAT_SECONDS)
        if content() not in ("", found):
            raise _in_use(workdir, content())
    latest = beat(0)
    time.sleep(HEARTBEAT_SECONDS / 10)  # of two that start at once, the later write wins
    if content() != latest:
        raise _in_use(workdir, content())
    done = threading.Event()

    def keep() -> None:
        nonlocal latest
        for count in itertools.count(1):
            if done.wait(HEARTBEAT_SECONDS):
                return
            with contextlib.suppress(Exception):  # a beat may be missed: two more come before others take over
                if (now := content()) not in ("", latest):
                    process.tell(f"igpt_jax: {_in_use(workdir, now)} This job ends.", sys.stderr)
                    os._exit(2)
                latest = beat(count)

    thread = threading.Thread(target=keep, name="lock heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if content() == latest:
            file.unlink(missing_ok=True)


def _gone(text: str) -> bool:
    """Whether a lock's text names a process of this host that no longer runs."""
    try:
        holder = json.loads(text)
        if holder["host"] != socket.gethostname():
            return False
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, PermissionError):
        return False
    return False
