"""The manifest of a pixel store: what it lists, its fingerprint, and hashes of the files."""

import concurrent.futures
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import palette

FORMAT = 2
SPLITS = ("train", "held_out", "test")
MANIFEST = "manifest.json"
SLICE = "slice.json"  # a manifest without a palette
PALETTE = "palette.npy"
PROGRESS = "progress.npz"
HASHERS = 4  # threads; each holds one file

# The manifest's fields that say what the images are, not where they came from; the fingerprint covers these.
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
        array = io.BytesIO()
        np.save(array, palette_VC)
        storage.publish(path / PALETTE, array.getvalue())
    manifest = {"format": FORMAT, "palette": "" if palette_VC is None else palette.digest(palette_VC),
                "quarantined": [], "skipped": {}, "class_names": [], **fields}
    manifest |= {"fingerprint": fingerprint_of(manifest), "files": files}
    storage.publish(path / (SLICE if palette_VC is None else MANIFEST), json.dumps(manifest, indent=1) + "\n")
    return manifest


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's IDENTITY, hexadecimal."""
    identity = {name: manifest[name] for name in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hashed(path: epath.Path, splits: Mapping[str, Any]) -> dict[str, list]:
    names = sorted(_files_of(path, splits))
    with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(path / name), names), strict=True))


def _digest(file: epath.Path) -> list:
    data = storage.read(file)
    return [len(data), hashlib.sha256(data).hexdigest()]


def _files_of(path: epath.Path, splits: Mapping[str, Any]) -> dict[str, int]:
    """The files of all arrays, as paths from the store's folder -> bytes. Hidden ones are the system's: left out."""
    folders = sorted({part["folder"] for split in splits.values() for part in split["parts"]})
    found: dict[str, int] = {}
    for folder in folders:
        if (path / folder).exists():
            found |= {f"{folder}/{name}": size for name, size in storage.listing(path / folder).items()}
    return found


def load_manifest(path: epath.Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of the store in `path`; None where there is no manifest.

    Args:
      name: SLICE for that of a slice.

    Raises:
      UserError: it is no manifest, of another format, or not as it was written.
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
        raise UserError(f"{file} has format {version!r}; this version reads {FORMAT}. Prepare the store again.")
    if fingerprint_of(manifest) != manifest["fingerprint"]:
        raise UserError(f"{file} was changed after it was written: its fingerprint differs. Restore it from a copy, "
                        "or prepare the store again.")
    return manifest


def files_in(manifest: Mapping[str, Any]) -> dict[str, list]:
    """The arrays' files of a manifest: name -> [bytes, SHA-256], without hidden ones, which older versions noted."""
    return {name: known for name, known in manifest["files"].items() if not name.rpartition("/")[2].startswith(".")}


def check_files(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Holds the store's files against its manifest: names and sizes, and the SHA-256 of the arrays' metadata.

    Data are held against their crc32c when they are read; `verify` holds all files against their SHA-256.

    Raises:
      UserError: names the first file that is missing, extra, or of another size or content.
    """
    def refuse(name: str, what: str) -> None:
        raise UserError(f"pixel store {path}: {name} {what}. Restore the store from a copy, or prepare it again.")

    known, there = files_in(manifest), _files_of(path, manifest["splits"])
    for name in sorted(known.keys() | there.keys()):
        if name not in there:
            refuse(name, "is missing")
        if name not in known:
            raise UserError(f"pixel store {path}: {name} is not in its manifest. Move that file out of the store.")
        if there[name] != known[name][0]:
            refuse(name, f"has {there[name]:,} bytes, not {known[name][0]:,}")
        if name.endswith("zarr.json") and _digest(path / name) != known[name]:
            refuse(name, "differs from its SHA-256")
