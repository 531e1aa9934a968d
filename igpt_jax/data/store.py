"""The pixel store: images and labels of each split, with checksums, on a local disk or in a bucket.

A store is a folder, the workdir of the prepare job:

    manifest.json   what it holds, with SHA-256 digests of every file; written last: a store without it is incomplete
    palette.npy     float32 [V, 3]
    SPLIT/images    zarr 3 array, uint8 [n, Y, X, C]
    SPLIT/labels    zarr 3 array, int32 [n]; where the source has labels
    progress.npz    of an interrupted job: what it has read and not yet written
    slice.json      in place of the manifest and the palette, where the store is a slice to be merged

A store that was merged from slices keeps their folders and names them in its manifest: no pixel is copied.

Any zarr 3 reader opens the arrays. An inner chunk of `chunk` images has a crc32c of its own, in a shard of about 64
MiB: with chunk=1 an image is one small read, and a flipped bit is an error instead of a picture.

Dimensions: B batch, T tokens; Y rows, X columns, C channels.
"""

import concurrent.futures
import functools
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from igpt_jax import palette, storage
from igpt_jax.config import UserError, nearest
from igpt_jax.data.order import Component

FORMAT = 2
SPLITS = ("train", "held_out", "test")
MANIFEST = "manifest.json"
SLICE = "slice.json"  # a manifest without a palette
PALETTE = "palette.npy"
PROGRESS = "progress.npz"
SHARD_BYTES = 64 * 2**20
LABELS_PER_CHUNK = 2**16
CACHE_BYTES = 256 * 2**20  # holds the shards' indices, 16 bytes an inner chunk, and for chunk > 1 the chunks
HASHERS = 4  # threads; each holds one file

# The manifest's fields that say what the images are, not where they came from; the fingerprint covers these.
IDENTITY = ("format", "image_size", "chunk", "resize", "seed", "held_out", "classes", "palette", "splits")
PART_FIELDS = ("folder", "count", "sha256", "labels_sha256")


def _array_spec(path: epath.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": storage.tensorstore_spec(path)}


def _create(path: epath.Path, chunk: list[int], dtype: str, codecs: list[dict]) -> tensorstore.TensorStore:
    metadata = {"shape": [0, *chunk[1:]], "data_type": dtype, "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
    # Chunks of zeros are stored too, so that a missing chunk is an error and not a black image.
    spec = {**_array_spec(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}


class _Appended:
    """An array that grows by whole shards.

    Its SHA-256 is that of the concatenated SHA-256 digests of its shards' rows: unlike one over all rows, it can be
    taken up again.
    """

    def __init__(self, path: epath.Path, rows_per_shard: int, chunk: int, dtype: str, codecs: list[dict]):
        self._path, self._rows, self.chunk, self._dtype, self._codecs = path, rows_per_shard, chunk, dtype, codecs
        self._pending: list[np.ndarray] = []
        self._array = None
        self._digests: list[str] = []
        self.count = self._written = 0

    def append(self, rows: np.ndarray) -> None:
        self._pending.append(rows)
        self.count += len(rows)
        while self.count - self._written >= self._rows:
            self._write(self._rows)

    def state(self) -> tuple[dict[str, Any], np.ndarray]:
        """What `restore` needs: a JSON object, and the rows not yet written."""
        pending = [np.concatenate(self._pending)] if self._pending else []
        self._pending = pending
        return {"written": self._written, "digests": self._digests}, pending[0] if pending else np.empty(0, self._dtype)

    def restore(self, state: Mapping[str, Any], pending: np.ndarray) -> None:
        self._written, self._digests = state["written"], list(state["digests"])
        self._pending = [pending] if len(pending) else []
        self.count = self._written + len(pending)
        if self._written:
            self._array = tensorstore.open(_array_spec(self._path), open=True).result()

    def finish(self) -> str:
        """Writes what is pending and returns the SHA-256, hexadecimal."""
        if self.count > self._written:
            self._write(self.count - self._written)
        if self._array is not None:  # an interrupted job may have written more than its progress tells
            self._array = self._array.resize(exclusive_max=[self.count, *self._array.shape[1:]]).result()
        return hashlib.sha256("".join(self._digests).encode()).hexdigest()

    def _write(self, count: int) -> None:
        rows = np.concatenate(self._pending)
        now, later = rows[:count], rows[count:]
        self._pending = [later.copy()] if len(later) else []
        start, stop = self._written, self._written + count
        if self._array is None:  # a split that fits into one shard gets one of its own size
            size = -(-count // self.chunk) * self.chunk
            self._array = _create(self._path, [size, *rows.shape[1:]], self._dtype, self._codecs)
        free = [None] * (rows.ndim - 1)
        self._array = self._array.resize(exclusive_max=[stop, *free], expand_only=True).result()
        self._array[start:stop].write(now).result()
        self._digests.append(hashlib.sha256(np.ascontiguousarray(now).data).hexdigest())
        self._written = stop


class Writer:
    """Writes a new store, image by image, in bounded memory: one shard per split. It can be interrupted.

    Args:
      path: the store's folder. What an interrupted Writer left there is replaced, unless `resume` takes it up.
      image_size: Y and X, pixels.
      chunk: images per inner chunk: 1 for local disks, some 64 for buckets, where small reads are slow.

    Raises:
      UserError: the folder holds other files where the store's arrays belong, or `chunk` is too large.
    """

    def __init__(self, path: epath.Path, image_size: int, chunk: int = 1):
        self._path, self._image_size, self.chunk = path, image_size, chunk
        self._arrays: dict[str, _Appended] = {}
        self._classes = 0
        most = max(1, SHARD_BYTES // (3 * image_size**2))
        if chunk > most:  # TensorStore takes the memory of a whole chunk, and aborts where there is none
            raise UserError(f"chunk={chunk}: {chunk:,} images of {image_size}x{image_size} exceed a shard of "
                            f"{SHARD_BYTES >> 20} MiB. Set it to {most:,} or less, or to 0.")
        for split in SPLITS:
            for name in ("images", "labels"):
                array = path / split / name
                if array.exists() and storage.listing(array) and not (array / "zarr.json").exists():
                    raise UserError(f"workdir {path}: {split}/{name} holds files that are not a pixel store's. "
                                    "Give an empty --workdir.")

    def add(self, split: str, images_BYXC: np.ndarray, labels_B: np.ndarray | None) -> None:
        """Appends images uint8 [B, Y, X, 3] and labels int32 [B] (None: unlabelled, then always) to a split."""
        size = self._image_size
        if images_BYXC.shape[1:] != (size, size, 3) or images_BYXC.dtype != np.uint8:
            raise ValueError(f"images {images_BYXC.dtype} {images_BYXC.shape} are not uint8 [B, {size}, {size}, 3]")
        images, labels = f"{split}/images", f"{split}/labels"
        if images in self._arrays and (labels_B is not None) != (labels in self._arrays):
            raise ValueError(f"split {split} mixes labelled and unlabelled images")
        for name in (images,) if labels_B is None else (images, labels):
            if name not in self._arrays:
                self._arrays[name] = self._array(name)
        self._arrays[images].append(images_BYXC)
        if labels_B is not None and len(labels_B):
            self._arrays[labels].append(labels_B.astype("<i4"))
            self._classes = max(self._classes, int(labels_B.max()) + 1)

    def _array(self, name: str) -> _Appended:
        if name.endswith("/labels"):
            return _Appended(self._path / name, LABELS_PER_CHUNK, 1, "int32", [LITTLE, CRC32C])
        size = self._image_size
        chunk = [self.chunk, size, size, 3]
        sharded = {"chunk_shape": chunk, "codecs": [{"name": "bytes"}, CRC32C], "index_codecs": [LITTLE, CRC32C]}
        shard = max(1, SHARD_BYTES // (3 * size**2 * self.chunk)) * self.chunk
        return _Appended(self._path / name, shard, self.chunk, "uint8",
                         [{"name": "sharding_indexed", "configuration": sharded}])

    def save(self, notes: Mapping[str, Any]) -> None:
        """Writes progress.npz, from which `resume` goes on; `notes` (JSON) come back from there."""
        states = {name: array.state() for name, array in self._arrays.items()}
        record = {"notes": notes, "classes": self._classes, "image_size": self._image_size, "chunk": self.chunk,
                  "arrays": {name: state for name, (state, _) in states.items()}}
        data = io.BytesIO()
        np.savez(data, record=np.frombuffer(json.dumps(record).encode(), np.uint8),
                 **{name: pending for name, (_, pending) in states.items()})
        storage.publish(self._path / PROGRESS, data.getvalue())

    def resume(self) -> dict[str, Any] | None:
        """Takes up what an interrupted Writer has saved, and returns its notes; None where there is nothing to."""
        file = self._path / PROGRESS
        if not file.exists():
            return None
        try:
            saved = dict(np.load(io.BytesIO(storage.read(file)), allow_pickle=False))
            record = json.loads(saved.pop("record").tobytes())
            if (record["image_size"], record["chunk"]) != (self._image_size, self.chunk):
                return None
            arrays = {name: self._array(name) for name in record["arrays"]}
            for name, array in arrays.items():
                array.restore(record["arrays"][name], saved[name])
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError):  # damaged: from the beginning, then
            return None
        self._arrays, self._classes = arrays, record["classes"]
        return record["notes"]

    def close(self) -> dict[str, dict[str, Any]]:
        """Writes what is pending. Returns the splits as the manifest has them."""
        splits = {}
        for name in [name for name in self._arrays if name.endswith("/images")]:
            split, labels = name.partition("/")[0], self._arrays.get(name.replace("images", "labels"))
            part = {"folder": split, "count": self._arrays[name].count, "sha256": self._arrays[name].finish(),
                    "labels_sha256": labels.finish() if labels else None}
            splits[split] = {"count": part["count"], "parts": [part]}
        return splits

    def split(self, name: str) -> "Split":
        """A split of what is written, after `close`."""
        return split_of(self._path, name, self.close(), self._image_size, self.chunk)

    def finish(self, palette_VC: np.ndarray | None, *, source: str, resize: str, seed: int, held_out: Mapping[str, Any],
               config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Writes the palette and, last, the manifest, which it returns.

        Args:
          palette_VC: float32 [V, 3]; None: of a slice.
          source: of the training images, as the user named it.
          resize: the rule by which images were resized.
          seed: of the held-out images and the palette.
          held_out: the share held out and its rule.
          config: of the prepare job.
          more: further fields of the manifest.
        """
        splits = self.close()
        fields = {"image_size": self._image_size, "chunk": self.chunk, "classes": self._classes, "splits": splits,
                  "source": source, "resize": resize, "seed": seed, "held_out": held_out, "config": config, **more}
        manifest = publish_manifest(self._path, palette_VC, fields, _hashed(self._path, splits))
        (self._path / PROGRESS).unlink(missing_ok=True)
        return manifest


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


def _hashed(path: epath.Path, splits: Mapping[str, Any]) -> dict[str, list]:
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


def verify(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """`check_files`, and reads all files and holds them against their SHA-256.

    Raises:
      UserError: names the first file that differs.
    """
    check_files(path, manifest)
    found = _hashed(path, manifest["splits"])
    for name, known in files_in(manifest).items():
        if found[name] != known:
            raise UserError(f"pixel store {path}: {name} differs from its SHA-256. Restore the store from a copy, or "
                            "prepare it again.")


class Store:
    """A complete pixel store, opened for reading.

    Attributes:
      path: its folder.
      manifest: its manifest.json.
      palette: its palette, float32 [V, 3].
      image_size: Y and X, pixels.
      classes: number of label values; 0 where unlabelled.
      fingerprint: SHA-256 that changes with any image, label, split or the palette.
    """

    def __init__(self, path: epath.Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.palette = palette.load(path / PALETTE)
        self.image_size, self.classes = manifest["image_size"], manifest["classes"]
        self.fingerprint = manifest["fingerprint"]
        if palette.digest(self.palette) != manifest["palette"]:
            raise UserError(f"{path / PALETTE} is not the palette that the manifest names. Restore it from a copy, "
                            "or prepare the store again.")
        check_files(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Store":
        """Opens the store in a workdir of prepare.

        Raises:
          UserError: missing, incomplete, damaged, or not a pixel store.
        """
        if not os.fspath(path):
            raise UserError("no pixel store is given. Set data.store to a workdir of the prepare job.")
        path = storage.path(path)
        manifest = load_manifest(path)
        if manifest is None:
            if (path / SLICE).exists():
                raise UserError(f"{path} is a slice of a pixel store. Merge the slices: prepare --config.shard=merge")
            if not storage.children(path) or not any((path / split).exists() for split in SPLITS):
                raise UserError(f"{path} is not a pixel store (it has no {MANIFEST}). "
                                "Give a workdir of the prepare job.")
            raise UserError(f"pixel store {path} is incomplete (it has no {MANIFEST}). Run its prepare job again.")
        return cls(path, manifest)

    def split(self, names: str) -> "Split":
        """A split, or several joined with +: `train`, `train+held_out`.

        Raises:
          UserError: a split that the store does not have, or an empty one.
        """
        return split_of(self.path, names, self.manifest["splits"], self.image_size, self.manifest["chunk"])


def split_of(path: epath.Path, names: str, known: Mapping[str, Any], image_size: int, chunk: int) -> "Split":
    """The splits `names`, joined with +, of a store whose manifest has `known` as its splits."""
    parts, contents = [], []
    for name in names.split("+"):
        if name not in known:
            raise UserError(f"split {name!r} is not in {path}. {_without(name, list(known))}")
        if not known[name]["count"]:
            raise UserError(f"split {name!r} of {path} is empty. Name another, or prepare a store with a "
                            "larger held_out. To train without a held-out split: --config.data.held_out=")
        for part in known[name]["parts"]:
            if part["count"]:
                labelled = part["labels_sha256"] is not None
                parts.append(_Part(path, part["folder"], part["count"], labelled, image_size))
        contents.append(known[name])
    fingerprint = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return Split(names, image_size, fingerprint, parts, chunk)


def _without(name: str, known: list[str]) -> str:
    """How to go on without a split."""
    if not known:
        return "None of the images could be used: quarantined.json says why."
    there = f"It has {', '.join(known)}."
    if name == "test":
        instead = ", or use --config.data.test=held_out" if "held_out" in known else ""
        return f"{there} Make one with prepare --config.test_source=...{instead}"
    if name == "held_out":
        return (f"{there} Make one with prepare --config.held_out=0.1, or name another split. To train without: "
                "--config.data.held_out=")
    return nearest(name, known)


class _Part:
    """The arrays of one split on disk, opened when they are first read."""

    def __init__(self, path: epath.Path, folder: str, count: int, labelled: bool, image_size: int):
        self.path, self.folder, self.count, self.labelled, self._size = path, folder, count, labelled, image_size

    @functools.cached_property
    def images(self) -> tensorstore.TensorStore:
        return self._open("images", (self.count, self._size, self._size, 3))

    @functools.cached_property
    def labels(self) -> tensorstore.TensorStore:
        return self._open("labels", (self.count,))

    def _open(self, kind: str, shape: tuple[int, ...]) -> tensorstore.TensorStore:
        spec = {**_array_spec(self.path / self.folder / kind), "fill_missing_data_reads": False,
                "recheck_cached_data": "open", "recheck_cached_metadata": "open"}
        try:
            array = tensorstore.open(spec, context=_context(), read=True).result()
        except ValueError as error:
            raise self._damage(kind, "cannot be opened", error) from None
        if array.shape != shape:
            raise self._damage(kind, f"has shape {list(array.shape)}, not {list(shape)}")
        return array

    def start(self, kind: str, ids: np.ndarray) -> tensorstore.Future:
        """Begins to read the images or labels of ids; `finish` waits for them."""
        return getattr(self, kind)[ids].read()

    def finish(self, kind: str, ids: np.ndarray, reading: tensorstore.Future) -> np.ndarray:
        """What `start` reads. Names the damaged entry: TensorStore names the file and the fault."""
        try:
            return reading.result()
        except ValueError as error:
            entry = _first_bad(getattr(self, kind), ids)
            raise self._damage(kind, f"entry {entry} cannot be read", error) from None

    def _damage(self, kind: str, what: str, error: Exception | str = "") -> UserError:
        reason = f" ({str(error).splitlines()[0].split(' [')[0]})" if str(error) else ""
        return UserError(f"pixel store {self.path}: {self.folder}/{kind} {what}{reason}. "
                         "Restore it from a copy, or prepare the store again.")


@functools.cache
def _context() -> tensorstore.Context:
    """One cache for all arrays of the process."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _first_bad(array: tensorstore.TensorStore, ids: np.ndarray) -> int:
    for i in ids:
        try:
            array[int(i)].read().result()
        except ValueError:
            return int(i)
    return int(ids[0])


class Split:
    """Images and labels of one split or several joined, by id in [0, count).

    Attributes:
      name: as asked for, such as `train+held_out`.
      count: number of images.
      image_size: Y and X, pixels.
      fingerprint: SHA-256 of its images' and labels' checksums.
      components: what `order` orders: one, with its count and the images per inner chunk; several in a mixture.
    """

    def __init__(self, name: str, image_size: int, fingerprint: str, parts: Sequence[_Part], chunk: int = 1):
        self.name, self.image_size, self.fingerprint, self._parts = name, image_size, fingerprint, list(parts)
        self._starts = np.cumsum([0, *(part.count for part in parts)])
        self.count = int(self._starts[-1])
        self.components: tuple[Component, ...] = (Component(self.count, block=chunk),)

    @classmethod
    def mixed(cls, splits: Sequence["Split"], weights: Sequence[int]) -> "Split":
        """One split of several, trained on in the proportions `weights`; ids of the second follow on the first's."""
        first = splits[0]
        contents = json.dumps([[split.fingerprint for split in splits], list(weights)])
        joined = cls(first.name, first.image_size, hashlib.sha256(contents.encode()).hexdigest(),
                     [part for split in splits for part in split._parts])
        joined.components = tuple(Component(split.count, weight, split.components[0].block)
                                  for split, weight in zip(splits, weights, strict=True))
        return joined

    @property
    def labelled(self) -> bool:
        """Whether all its images have labels."""
        return all(part.labelled for part in self._parts)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images uint8 [B, Y, X, 3] of ids [B].

        Raises:
          UserError: an image is damaged or missing on disk; names its split, entry and file.
        """
        images_BYXC = np.empty((len(ids), self.image_size, self.image_size, 3), np.uint8)
        return self._gather("images", ids, images_BYXC)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int32 [B] of ids [B].

        Raises:
          UserError: the split has no labels, or one is damaged on disk.
        """
        for part in self._parts:
            if not part.labelled:
                raise UserError(f"split {part.folder!r} of {part.path} has no labels. Prepare it from a labelled "
                                "source.")
        return self._gather("labels", ids, np.empty(len(ids), np.int32))

    def _gather(self, kind: str, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.count):
            raise IndexError(f"ids must lie in [0, {self.count})")
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        reading = []
        for i in np.unique(owner):  # all parts at once: in a bucket each read waits
            place = np.flatnonzero(owner == i)
            local = ids[place] - self._starts[i]
            reading.append((self._parts[i], place, local, self._parts[i].start(kind, local)))
        for part, place, local, future in reading:
            rows[place] = part.finish(kind, local, future)
        return rows


def tokens_of(split: Split, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Tokens uint16 [B, T] of ids [B], with a lookup table of `palette.lookup_table`."""
    return palette.encode(split.read(ids), table)
