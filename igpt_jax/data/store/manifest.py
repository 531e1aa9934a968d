"""Writes, reads and checks the manifest of a pixel store: its fields, its fingerprint, and the hashes of its files."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import palette
from igpt_jax.storage.hashes import json_digest

FORMAT = 2
SPLITS = ("train", "held_out", "test")
MANIFEST = "manifest.json"
SLICE = "slice.json"  # a manifest without a palette
PALETTE = "palette.npy"
PROGRESS = "progress.npz"
AGAIN = f"Restore it from a copy, or remove {MANIFEST} (of a slice: {SLICE}) and prepare it again."
HASHERS = 4  # threads; each holds one file

# The fields that the fingerprint covers: those that determine the images, but not where they came from.
IDENTITY = ("format", "image_size", "chunk", "resize", "seed", "held_out", "classes", "palette", "splits")
PART_FIELDS = ("folder", "count", "sha256", "labels_sha256")


def publish_manifest(path: epath.Path, palette_VC: np.ndarray | None, fields: Mapping[str, Any],
                     files: Mapping[str, Any]) -> dict[str, Any]:
    """Writes palette.npy and then manifest.json with `fields`; returns the manifest.

    Args:
      palette_VC: float32 [V, 3]; None: writes slice.json alone.
      files: the arrays' files: name -> [bytes, SHA-256].
    """
    if palette_VC is not None:
        palette.save(path / PALETTE, palette_VC)
    manifest = {"format": FORMAT, "palette": "" if palette_VC is None else palette.digest(palette_VC),
                "quarantined": [], "skipped": {}, "class_names": [], **fields}
    manifest |= {"fingerprint": fingerprint_of(manifest), "files": files}
    storage.publish(path / (SLICE if palette_VC is None else MANIFEST), json.dumps(manifest, indent=1) + "\n")
    return manifest


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's IDENTITY, hexadecimal."""
    identity = {name: manifest[name] for name in IDENTITY}
    return json_digest(identity, length=64)


def damaged(path: epath.Path, name: str, problem: str) -> UserError:
    """The error for a file of the store in `path` that is not as it was written."""
    return UserError(f"pixel store {path}: {name} {problem}. {AGAIN}")


def size_and_hash(data: bytes) -> list:
    """[bytes, SHA-256] of a file's content, as the manifest lists them."""
    return [len(data), hashlib.sha256(data).hexdigest()]


def hashed(path: epath.Path, splits: Mapping[str, Any]) -> dict[str, list]:
    """The arrays' files of a store, read from disk: name -> [bytes, SHA-256]."""
    names = sorted(_files_of(path, splits))
    hashes = storage.concurrently(lambda name: size_and_hash(storage.read(path / name)), names, HASHERS)
    return dict(zip(names, hashes, strict=True))


def _files_of(path: epath.Path, splits: Mapping[str, Any]) -> dict[str, int]:
    """The files of all arrays: path relative to the store -> bytes. The system's hidden files are left out."""
    folders = sorted({part["folder"] for split in splits.values() for part in split["parts"]})
    listings = storage.concurrently(
        lambda folder: storage.listing(path / folder) if (path / folder).exists() else {}, folders)
    return {f"{folder}/{name}": size for folder, listing in zip(folders, listings, strict=True)
            for name, size in listing.items()}


def load_manifest(path: epath.Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of the store in `path`; None where there is no manifest.

    Args:
      name: SLICE to read a slice's.

    Raises:
      UserError: it is not a manifest, has another format, or was changed after it was written.
    """
    file = path / name
    if not file.exists():
        return None
    try:
        manifest = storage.parse_json(storage.read(file))
        version = manifest["format"]
        missing = [name for name in (*IDENTITY, "fingerprint", "config", "quarantined", "files")
                   if name not in manifest]
        missing += [name for split in manifest["splits"].values() for part in split.get("parts", [{}])
                    for name in PART_FIELDS if name not in part]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not the manifest of a pixel store. Make one with the prepare job.") from None
    if version != FORMAT or missing:
        raise UserError(f"{file} has format {version!r}; this version reads {FORMAT}. {AGAIN}")
    if fingerprint_of(manifest) != manifest["fingerprint"]:
        raise UserError(f"{file} was changed after it was written: its fingerprint differs. {AGAIN}")
    return manifest


def files_in(manifest: Mapping[str, Any]) -> dict[str, list]:
    """The arrays' files of a manifest: name -> [bytes, SHA-256], without hidden ones, which older versions listed."""
    return {name: known for name, known in manifest["files"].items() if not name.rpartition("/")[2].startswith(".")}


def check_files(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Checks the names and sizes of the store's files, and the SHA-256 of the arrays' metadata, against the manifest.

    Images and labels are checked against their crc32c when they are read; `verify` checks every file's SHA-256.

    Raises:
      UserError: names the first file that is missing, extra, or of another size or content.
    """
    known, found = files_in(manifest), _files_of(path, manifest["splits"])
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            raise damaged(path, name, "is missing")
        if name not in known:
            raise UserError(f"pixel store {path}: {name} is not in its manifest. Move that file out of the store.")
        if found[name] != known[name][0]:
            raise damaged(path, name, f"has {found[name]:,} bytes, not {known[name][0]:,}")
    metadata = sorted(name for name in known if name.endswith("zarr.json"))
    hashes = storage.concurrently(lambda name: size_and_hash(storage.read(path / name)), metadata)
    for name, stored in zip(metadata, hashes, strict=True):
        if stored != known[name]:
            raise damaged(path, name, "differs from its SHA-256")
