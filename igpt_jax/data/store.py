"""The pixel store: images and labels of each split, with checksums, on a local disk or in a bucket.

A store is a folder, the workdir of the prepare job:

    manifest.json   what it holds, with SHA-256 digests; written last: a store without it is incomplete
    palette.npy     float32 [V, 3]
    SPLIT/images    zarr 3 array, uint8 [n, Y, X, C]
    SPLIT/labels    zarr 3 array, int32 [n]; where the source has labels

Any zarr 3 reader opens the arrays. Each image is an inner chunk with a crc32c of its own in a shard of about 64 MiB,
so one image is one small read, and a flipped bit is an error instead of a picture.

Dimensions: B batch, T tokens; Y rows, X columns, C channels.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from igpt_jax import palette, storage
from igpt_jax.config import UserError, nearest

FORMAT = 1
SPLITS = ("train", "held_out", "test")
MANIFEST = "manifest.json"
PALETTE = "palette.npy"
SHARD_BYTES = 64 * 2**20
LABELS_PER_CHUNK = 2**16
CACHE_BYTES = 256 * 2**20  # holds the shards' indices, 16 bytes an image

# The manifest's fields that say what the images are, not where they came from; the fingerprint covers these.
IDENTITY = ("format", "image_size", "resize", "seed", "held_out", "classes", "palette", "splits")


SPLIT_FIELDS = ("count", "sha256", "labels_sha256")


def _array_spec(path: epath.Path) -> dict[str, Any]:
    url = os.fspath(path)
    store = {"driver": "file", "path": os.path.abspath(url) + "/"} if storage.is_local(path) else url + "/"
    return {"driver": "zarr3", "kvstore": store}


def _create(path: epath.Path, chunk: list[int], dtype: str, codecs: list[dict]) -> tensorstore.TensorStore:
    metadata = {"shape": [0, *chunk[1:]], "data_type": dtype, "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
    # Chunks of zeros are stored too, so that a missing chunk is an error and not a black image.
    spec = {**_array_spec(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}


class _Appended:
    """An array that grows by whole chunks, and the SHA-256 of its rows in order."""

    def __init__(self, path: epath.Path, rows_per_chunk: int, dtype: str, codecs: list[dict]):
        self._path, self._rows, self._dtype, self._codecs = path, rows_per_chunk, dtype, codecs
        self._pending: list[np.ndarray] = []
        self._array = None
        self._sha256 = hashlib.sha256()
        self.count = self._written = 0

    def append(self, rows: np.ndarray) -> None:
        self._sha256.update(np.ascontiguousarray(rows).data)
        self._pending.append(rows)
        self.count += len(rows)
        while self.count - self._written >= self._rows:
            self._write(self._rows)

    def finish(self) -> str:
        """Writes what is pending and returns the SHA-256, hexadecimal."""
        if self.count > self._written:
            self._write(self.count - self._written)
        return self._sha256.hexdigest()

    def _write(self, count: int) -> None:
        rows = np.concatenate(self._pending)
        now, later = rows[:count], rows[count:]
        self._pending = [later.copy()] if len(later) else []
        start, stop = self._written, self._written + count
        if self._array is None:  # a split that fits into one chunk gets a chunk of its own size
            self._array = _create(self._path, [count, *rows.shape[1:]], self._dtype, self._codecs)
        free = [None] * (rows.ndim - 1)
        self._array = self._array.resize(exclusive_max=[stop, *free], expand_only=True).result()
        self._array[start:stop].write(now).result()
        self._written = stop


class Writer:
    """Writes a new store, image by image, in bounded memory: one shard per split.

    Args:
      path: the store's folder. What an interrupted Writer left there is replaced.
      image_size: Y and X, pixels.

    Raises:
      UserError: the folder holds other files where the store's arrays belong.
    """

    def __init__(self, path: epath.Path, image_size: int):
        self._path, self._image_size = path, image_size
        self._images: dict[str, _Appended] = {}
        self._labels: dict[str, _Appended] = {}
        self._classes = 0
        for split in SPLITS:
            for name in ("images", "labels"):
                array = path / split / name
                if array.exists() and any(array.iterdir()) and not (array / "zarr.json").exists():
                    raise UserError(f"workdir {path}: {split}/{name} holds files that are not a pixel store's. "
                                    "Give an empty --workdir.")

    def add(self, split: str, images_BYXC: np.ndarray, labels_B: np.ndarray | None) -> None:
        """Appends images uint8 [B, Y, X, 3] and labels int32 [B] (None: unlabelled, then always) to a split."""
        size = self._image_size
        if images_BYXC.shape[1:] != (size, size, 3) or images_BYXC.dtype != np.uint8:
            raise ValueError(f"images {images_BYXC.dtype} {images_BYXC.shape} are not uint8 [B, {size}, {size}, 3]")
        if split not in self._images:
            chunk, folder = [1, size, size, 3], self._path / split
            sharded = {"chunk_shape": chunk, "codecs": [{"name": "bytes"}, CRC32C], "index_codecs": [LITTLE, CRC32C]}
            self._images[split] = _Appended(folder / "images", max(1, SHARD_BYTES // (3 * size**2)), "uint8",
                                            [{"name": "sharding_indexed", "configuration": sharded}])
            if labels_B is not None:
                self._labels[split] = _Appended(folder / "labels", LABELS_PER_CHUNK, "int32", [LITTLE, CRC32C])
        if (labels_B is not None) != (split in self._labels):
            raise ValueError(f"split {split} mixes labelled and unlabelled images")
        self._images[split].append(images_BYXC)
        if labels_B is not None and len(labels_B):
            self._labels[split].append(labels_B.astype("<i4"))
            self._classes = max(self._classes, int(labels_B.max()) + 1)

    def finish(self, palette_VC: np.ndarray, *, source: str, resize: str, seed: int, held_out: Mapping[str, Any],
               config: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the palette and, last, the manifest, which it returns.

        Args:
          palette_VC: float32 [V, 3].
          source: of the training images, as the user named it.
          resize: the rule by which images were resized.
          seed: of the held-out images and the palette.
          held_out: the share held out and its rule.
          config: of the prepare job.
        """
        splits = {}
        for split, images in self._images.items():
            labels = self._labels.get(split)
            splits[split] = {"count": images.count, "sha256": images.finish(),
                             "labels_sha256": labels.finish() if labels else None}
        array = io.BytesIO()
        np.save(array, palette_VC)
        storage.publish(self._path / PALETTE, array.getvalue())
        manifest = {"format": FORMAT, "image_size": self._image_size, "classes": self._classes,
                    "palette": palette.digest(palette_VC), "splits": splits, "source": source, "resize": resize,
                    "seed": seed, "held_out": held_out, "quarantined": [], "config": config}
        identity = {name: manifest[name] for name in IDENTITY}
        manifest["fingerprint"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        storage.publish(self._path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return manifest


def load_manifest(path: epath.Path) -> dict[str, Any] | None:
    """The manifest of the store in `path`; None where there is no manifest.

    Raises:
      UserError: it is no manifest, or of another format.
    """
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(storage.read(file))
        version = manifest["format"]
        missing = [name for name in (*IDENTITY, "fingerprint", "config", "quarantined") if name not in manifest]
        missing += [name for split in manifest["splits"].values() for name in SPLIT_FIELDS if name not in split]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not the manifest of a pixel store. Make one with the prepare job.") from None
    if version != FORMAT or missing:
        raise UserError(f"{file} has format {version!r}; this version reads {FORMAT}. Prepare the store again.")
    return manifest


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

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Store":
        """Opens the store in a workdir of prepare.

        Raises:
          UserError: missing, incomplete, or not a pixel store.
        """
        if not os.fspath(path):
            raise UserError("no pixel store is given. Set data.store to a workdir of the prepare job.")
        path = storage.path(path)
        manifest = load_manifest(path)
        if manifest is None:
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
        known, parts = self.manifest["splits"], []
        for name in names.split("+"):
            if name not in known:
                raise UserError(f"split {name!r} is not in {self.path}. {nearest(name, list(known))}")
            if not known[name]["count"]:
                raise UserError(f"split {name!r} of {self.path} is empty. Name another, or prepare a store with a "
                                "larger held_out. To train without a held-out split: --config.data.held_out=")
            labelled = known[name]["labels_sha256"] is not None
            parts.append(_Part(self.path, name, known[name]["count"], labelled, self.image_size))
        contents = json.dumps([known[part.name] for part in parts], sort_keys=True)
        return Split(names, self.image_size, hashlib.sha256(contents.encode()).hexdigest(), parts)


class _Part:
    """The arrays of one split on disk."""

    def __init__(self, path: epath.Path, name: str, count: int, labelled: bool, image_size: int):
        self.path, self.name, self.count, self.labelled = path, name, count, labelled
        self._images = self._open("images", (count, image_size, image_size, 3))
        self._labels = self._open("labels", (count,)) if labelled else None

    def _open(self, kind: str, shape: tuple[int, ...]) -> tensorstore.TensorStore:
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        spec = {**_array_spec(self.path / self.name / kind), "fill_missing_data_reads": False,
                "recheck_cached_data": "open", "recheck_cached_metadata": "open"}
        try:
            array = tensorstore.open(spec, context=context, read=True).result()
        except ValueError as error:
            raise self._damage(kind, "cannot be opened", error) from None
        if array.shape != shape:
            raise self._damage(kind, f"has shape {list(array.shape)}, not {list(shape)}")
        return array

    def read(self, ids: np.ndarray) -> np.ndarray:
        with self._checked("images", ids):
            return self._images[ids].read().result()

    def read_labels(self, ids: np.ndarray) -> np.ndarray:
        with self._checked("labels", ids):
            return self._labels[ids].read().result()

    @contextlib.contextmanager
    def _checked(self, kind: str, ids: np.ndarray) -> Iterator[None]:
        """Names the damaged entry: TensorStore names the file and the fault."""
        try:
            yield
        except ValueError as error:
            array = self._images if kind == "images" else self._labels
            raise self._damage(kind, f"entry {_first_bad(array, ids)} cannot be read", error) from None

    def _damage(self, kind: str, what: str, error: Exception | str = "") -> UserError:
        reason = f" ({str(error).splitlines()[0].split(' [')[0]})" if str(error) else ""
        return UserError(f"pixel store {self.path}: {self.name}/{kind} {what}{reason}. "
                         "Restore it from a copy, or prepare the store again.")


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
    """

    def __init__(self, name: str, image_size: int, fingerprint: str, parts: list[_Part]):
        self.name, self.image_size, self.fingerprint, self._parts = name, image_size, fingerprint, parts
        self._starts = np.cumsum([0, *(part.count for part in parts)])
        self.count = int(self._starts[-1])

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images uint8 [B, Y, X, 3] of ids [B].

        Raises:
          UserError: an image is damaged or missing on disk; names its split, entry and file.
        """
        images_BYXC = np.empty((len(ids), self.image_size, self.image_size, 3), np.uint8)
        for part, place, local in self._located(ids):
            images_BYXC[place] = part.read(local)
        return images_BYXC

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int32 [B] of ids [B].

        Raises:
          UserError: the split has no labels, or one is damaged on disk.
        """
        for part in self._parts:
            if not part.labelled:
                raise UserError(f"split {part.name!r} of {part.path} has no labels. Prepare it from a labelled source.")
        labels_B = np.empty(len(ids), np.int32)
        for part, place, local in self._located(ids):
            labels_B[place] = part.read_labels(local)
        return labels_B

    def _located(self, ids: np.ndarray) -> Iterator[tuple[_Part, np.ndarray, np.ndarray]]:
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.count):
            raise IndexError(f"ids must lie in [0, {self.count})")
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        for i in np.unique(owner):
            place = np.flatnonzero(owner == i)
            yield self._parts[i], place, ids[place] - self._starts[i]


def open_split(path: str, names: str, image_size: int) -> Split:
    """A split of the store in `path` for a model of `image_size`. Raises UserError where they do not fit."""
    split = Store.open(path).split(names)
    if split.image_size != image_size:
        raise UserError(f"the store {path} holds images of {split.image_size} pixels, the model takes {image_size}. "
                        f"Prepare a store with image_size={image_size}.")
    return split


def tokens_of(split: Split, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Tokens uint16 [B, T] of ids [B], with a lookup table of `palette.lookup_table`."""
    return palette.encode(split.read(ids), table)
