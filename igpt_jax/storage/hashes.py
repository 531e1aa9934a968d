"""Whether bytes are what was written: JSON with a CRC of itself, and the SHA-256 of all files of a folder."""

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
LARGEST = 64 * 2**20  # bytes of JSON or of a list of hashes that are read at all


class Damaged(Exception):
    """A checkpoint is not what was written. The message names the file or the array."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with a CRC of itself."""
    value = json.loads(json.dumps(value, default=lambda scalar: scalar.item()))
    return {**value, "crc32": zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def unsealed(value: Mapping[str, Any], file: str) -> dict[str, Any]:
    """`value` without its CRC. Raises Damaged, which names `file`."""
    if not isinstance(value, Mapping):
        raise Damaged(f"{file} is not a JSON object")
    rest = {name: part for name, part in value.items() if name != "crc32"}
    if zlib.crc32(json.dumps(rest, sort_keys=True).encode()) != value.get("crc32"):
        raise Damaged(f"the CRC in {file} is wrong")
    return rest


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises Damaged."""
    try:
        if (size := path.stat().length) > LARGEST:
            raise Damaged(f"{path.name} has {size:,} bytes: more than it can need")
        return parse_json(path.read_bytes())
    except (ValueError, FileNotFoundError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from None


def files_of(step: Path) -> list[str]:
    """The files of a step on a local disk, relative to it. Raises Damaged where one is a link, which leads elsewhere,
    or a pipe or device, which may never end."""
    files = []
    for root, folders, names in os.walk(step):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise Damaged(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'no file'}")
        files += [os.path.relpath(os.path.join(root, name), step) for name in names]
    return sorted(files)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(step: Path) -> None:
    """Writes SHA256SUMS, of all files of a finished step. Buckets keep checksums of their own."""
    if is_local(step):
        with ThreadPoolExecutor() as pool:
            files = files_of(step)
            hashes = pool.map(_sha256, [step / file for file in files])
            lines = [f"{digest}  {file}\n" for digest, file in zip(hashes, files, strict=True)]
        publish(step / HASHES, "".join(lines))


def check_hashes(step: Path, unread: Collection[str] = ()) -> bool:
    """Whether a step has file hashes at all; all are compared but those of files in the folders `unread`.

    Raises:
      Damaged: names the first file that is missing or is not what was written.
    """
    if not is_local(step):
        return False
    files_of(step)
    if not (step / HASHES).exists():  # the run was killed before it could write them
        return False
    if (step / HASHES).stat().length > LARGEST:
        raise Damaged(f"{HASHES} is not a list of hashes")
    lines = (step / HASHES).read_bytes().decode(errors="replace").splitlines()
    parts = [line.partition("  ") for line in lines]
    if not parts or not all(len(digest) == 64 and file and ".." not in file.split("/") for digest, _, file in parts):
        raise Damaged(f"{HASHES} is not a list of hashes")
    wanted = [(digest, file) for digest, _, file in parts if file.split("/")[0] not in unread]
    with ThreadPoolExecutor() as pool:
        for (digest, file), found in zip(wanted, pool.map(lambda part: _hash_of(step / part[1]), wanted), strict=True):
            if found != digest:
                raise Damaged(f"{file} is not what was written" if found else f"{file} is missing")
    return True


def _hash_of(path: Path) -> str | None:
    try:
        return _sha256(path)
    except (OSError, ValueError):  # no such file, or a name that a damaged list made up
        return None
