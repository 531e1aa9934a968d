"""Checksums of files: JSON objects with a CRC, SHA256SUMS of a folder, digests of JSON values."""

import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from igpt_jax.storage.files import publish
from igpt_jax.storage.json import parse_json
from igpt_jax.storage.paths import Path, is_local

HASHES = "SHA256SUMS"
UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)  # of a file that is damaged
LARGEST = 64 * 2**20  # bytes; larger JSON files and lists of hashes are damaged, and are not read into memory


class Damaged(Exception):
    """A checkpoint differs from what was written. The message names the file or the array."""


def json_digest(value: Any, length: int = 16) -> str:
    """The first `length` of 64 hexadecimal digits of a JSON value's SHA-256. Equal values give equal digests: the keys
    of objects are sorted first."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own CRC in the key `crc32`."""
    value = json.loads(json.dumps(value, default=lambda scalar: scalar.item()))
    return {**value, "crc32": zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def unsealed(value: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The object that `sealed` was given. Raises Damaged, which names `file`, if the CRC does not match."""
    if not isinstance(value, Mapping):
        raise Damaged(f"{file} is not a JSON object")
    rest = {name: field for name, field in value.items() if name != "crc32"}
    if zlib.crc32(json.dumps(rest, sort_keys=True).encode()) != value.get("crc32"):
        raise Damaged(f"the CRC in {file} is wrong")
    return rest


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises Damaged."""
    try:
        if (size := path.stat().length) > LARGEST:
            raise Damaged(f"{path.name} has {size:,} bytes, more than any such file")
        return parse_json(path.read_bytes())
    except (ValueError, FileNotFoundError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from None


def files_of(step: Path) -> list[str]:
    """The files of a step on a local disk, relative to it.

    Raises:
      Damaged: one of them is a link, which may lead out of the step, or a pipe or device, whose reading may never end.
    """
    files = []
    for root, folders, names in os.walk(step):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise Damaged(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'not a regular file'}")
        files += [os.path.relpath(os.path.join(root, name), step) for name in names]
    return sorted(files)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(step: Path) -> None:
    """Writes SHA256SUMS for all files of a finished step, on a local disk; buckets have checksums of their own."""
    if is_local(step):
        with ThreadPoolExecutor() as pool:
            files = files_of(step)
            hashes = pool.map(_sha256, [step / file for file in files])
            lines = [f"{digest}  {file}\n" for digest, file in zip(hashes, files, strict=True)]
        publish(step / HASHES, "".join(lines))


def check_hashes(step: Path, unread: Collection[str] = ()) -> bool:
    """Compares a step's files with its SHA256SUMS, except those in the folders `unread`. False if it has none.

    Raises:
      Damaged: names the first file that is missing or differs from what was written.
    """
    if not is_local(step):
        return False
    files_of(step)
    if not (step / HASHES).exists():  # the run was killed before it wrote them
        return False
    if (step / HASHES).stat().length > LARGEST:
        raise Damaged(f"{HASHES} is not a list of hashes")
    lines = (step / HASHES).read_bytes().decode(errors="replace").splitlines()
    entries = [line.partition("  ") for line in lines]
    if not entries or not all(len(digest) == 64 and file and not file.startswith("/") and ".." not in file.split("/")
                              for digest, _, file in entries):
        raise Damaged(f"{HASHES} is not a list of hashes")
    wanted = [(digest, file) for digest, _, file in entries if file.split("/")[0] not in unread]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda entry: _hash_of(step / entry[1]), wanted)
        for (digest, file), found in zip(wanted, hashes, strict=True):
            if found != digest:
                raise Damaged(f"{file} is not what was written" if found else f"{file} is missing")
    return True


def _hash_of(path: Path) -> str | None:
    try:
        return _sha256(path)
    except ValueError:  # an impossible name in a damaged list
        return None
    except OSError as error:
        if error.errno in UNREADABLE:
            return None
        raise  # such as a shared disk that is out of reach
