"""Reads images and labels of a pixel store by id, and verifies their checksums."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError, nearest
from igpt_jax.data import palette
from igpt_jax.data.order import Component
from igpt_jax.data.store.arrays import array_spec
from igpt_jax.data.store.manifest import AGAIN, MANIFEST, PALETTE, SLICE, SPLITS, check_files, load_manifest
from igpt_jax.storage.hashes import json_digest

CACHE_BYTES = 256 * 2**20  # for the shards' indices (16 bytes per inner chunk) and, where chunk > 1, the chunks
LARGEST_CACHE_BYTES = 2**31  # for training; a larger window reads its chunks more than once


class Store:
    """A complete pixel store, opened for reading.

    Attributes:
      path: its folder.
      manifest: its manifest.json.
      palette: its palette, float32 [V, 3].
      image_size: Y and X, pixels.
      classes: number of label values; 0 where unlabeled.
      fingerprint: SHA-256 that changes with any image, label, split or the palette.
    """

    def __init__(self, path: epath.Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.palette = palette.load(path / PALETTE)
        self.image_size, self.classes = manifest["image_size"], manifest["classes"]
        self.fingerprint = manifest["fingerprint"]
        if palette.digest(self.palette) != manifest["palette"]:
            raise UserError(f"{path / PALETTE} is not the palette that the manifest lists. {AGAIN}")
        check_files(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Store":
        """Opens the store in a workdir of the prepare job.

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
          UserError: the store does not have a split, or it is empty.
        """
        return split_of(self.path, names, self.manifest["splits"], self.image_size, self.manifest["chunk"])


def split_of(path: epath.Path, names: str, known: Mapping[str, Any], image_size: int, chunk: int) -> "Split":
    """The splits `names`, joined with +, of a store whose manifest lists the splits `known`."""
    parts, contents = [], []
    for name in names.split("+"):
        if name not in known:
            raise UserError(f"split {name!r} is not in {path}. {_without(name, list(known))}")
        if not known[name]["count"]:
            raise UserError(f"split {name!r} of {path} is empty. Name another, or prepare a store with a "
                            "larger held_out. To train without a held-out split: --config.data.held_out=")
        for part in known[name]["parts"]:
            if part["count"]:
                labeled = part["labels_sha256"] is not None
                parts.append(_Part(path, part["folder"], part["count"], labeled, image_size))
        contents.append(known[name])
    aligned = all(content.get("aligned") for content in contents)
    return Split(names, image_size, json_digest(contents, length=64), _spans(parts, chunk, aligned), chunk)


def _without(name: str, known: list[str]) -> str:
    """What a user can do about a missing split."""
    if not known:
        return "None of the images could be used: quarantined.json says why."
    available = f"It has {', '.join(known)}."
    if name == "test":
        instead = (" Or name held_out in its place: --config.data.test=held_out (evaluate and sample: "
                   "--config.data.split=held_out)" if "held_out" in known else "")
        return (f"{available} Prepare another store with a test split: prepare --workdir=DIR "
                f"--config.test_source=SOURCE, and the other settings as before.{instead}")
    if name == "held_out":
        return (f"{available} Make one with prepare --config.held_out=0.1, or name another split. To train without: "
                "--config.data.held_out=")
    return nearest(name, known)


class _Part:
    """The arrays of one folder of a store, `images` and `labels`, opened when they are first read."""

    def __init__(self, path: epath.Path, folder: str, count: int, labeled: bool, image_size: int):
        self.path, self.folder, self.count, self.labeled, self._size = path, folder, count, labeled, image_size
        self._cache_bytes = CACHE_BYTES
        self._opening: dict[str, tensorstore.Future] = {}

    def set_cache(self, limit: int) -> None:
        """Caches images in `limit` bytes, which all parts of the process with this limit share."""
        self._cache_bytes = limit
        self._opening.pop("images", None)  # an array keeps the cache that it was opened with

    def open(self, kind: str) -> tensorstore.Future:
        """Starts to open an array, or returns the one that is open."""
        if opening := self._opening.get(kind):
            return opening
        spec = {**array_spec(self.path / self.folder / kind), "fill_missing_data_reads": False,
                "recheck_cached_data": "open", "recheck_cached_metadata": "open"}
        self._opening[kind] = opening = tensorstore.open(spec, context=_context(self._cache_bytes), read=True)
        return opening

    def _array(self, kind: str) -> tensorstore.TensorStore:
        try:
            array = self.open(kind).result()
        except ValueError as error:
            self._opening.pop(kind, None)
            if storage.unreachable(error):
                raise
            raise self._damage(kind, "cannot be opened", error) from None
        shape = (self.count, self._size, self._size, 3) if kind == "images" else (self.count,)
        if array.shape != shape:
            raise self._damage(kind, f"has shape {list(array.shape)}, not {list(shape)}")
        return array

    def start(self, kind: str, ids: np.ndarray) -> tensorstore.Future:
        """Starts to read the images or labels of ids; `finish` waits for them."""
        return self._array(kind)[ids].read()

    def finish(self, kind: str, ids: np.ndarray, reading: tensorstore.Future) -> np.ndarray:
        """The rows that `start` reads. Errors name the damaged entry; TensorStore's errors name only the file."""
        try:
            return reading.result()
        except ValueError as error:
            if storage.unreachable(error):
                raise
            entry = _first_bad(self._array(kind), ids)
            raise self._damage(kind, f"entry {entry} cannot be read", error) from None

    def _damage(self, kind: str, what: str, error: Exception | str = "") -> UserError:
        reason = f" ({str(error).splitlines()[0].split(' [')[0]})" if str(error) else ""
        return UserError(f"pixel store {self.path}: {self.folder}/{kind} {what}{reason}. {AGAIN}")


@functools.cache
def _context(cache_bytes: int) -> tensorstore.Context:
    """One cache of this size, shared by all arrays of the process that use it."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def _first_bad(array: tensorstore.TensorStore, ids: np.ndarray) -> int:
    """The first id that cannot be read, found by reading one at a time."""
    for i in ids:
        try:
            array[int(i)].read().result()
        except ValueError:
            return int(i)
    return int(ids[0])


class _Span(NamedTuple):
    """Neighboring rows of a part, which have neighboring ids."""
    part: _Part
    first: int
    count: int


def _spans(parts: Sequence[_Part], chunk: int, aligned: bool) -> list[_Span]:
    """The rows of all parts in the order of their ids: part by part, or, if `aligned`, all whole chunks first.

    If chunks of ids are chunks of the files, reading one touches one. Part by part they are shifted behind each part
    that ends within a chunk, and reading one touches two.
    """
    whole = [part.count // chunk * chunk if aligned else part.count for part in parts]
    spans = [_Span(part, 0, count) for part, count in zip(parts, whole, strict=True)]
    spans += [_Span(part, count, part.count - count) for part, count in zip(parts, whole, strict=True)]
    return [span for span in spans if span.count]


class Split:
    """Images and labels of one split or several joined, by id in [0, count).

    Attributes:
      name: as requested, such as `train+held_out`.
      count: number of images.
      image_size: Y and X, pixels.
      fingerprint: SHA-256 of the checksums of its images and labels.
      components: for `order`: one component with the count and the images per chunk; several in a mixture.
    """

    def __init__(self, name: str, image_size: int, fingerprint: str, spans: Sequence[_Span], chunk: int = 1):
        self.name, self.image_size, self.fingerprint, self._spans = name, image_size, fingerprint, list(spans)
        self._starts = np.cumsum([0, *(span.count for span in spans)])
        self.count = int(self._starts[-1])
        self.components: tuple[Component, ...] = (Component(self.count, chunk=chunk),)
        shifted = sum(span.count for start, span in zip(self._starts, spans, strict=False)
                      if (start - span.first) % chunk)  # each of their chunks of ids touches two of a file
        chunk_bytes = 3 * image_size**2 * chunk
        self._slot_bytes = 0 if chunk == 1 else chunk_bytes * (self.count + shifted) // self.count

    @classmethod
    def mixed(cls, splits: Sequence["Split"], weights: Sequence[int]) -> "Split":
        """Several splits as one, mixed in the proportions `weights`. Ids are numbered one split after the other."""
        first = splits[0]
        contents = [[split.fingerprint for split in splits], list(weights)]
        joined = cls(first.name, first.image_size, json_digest(contents, length=64),
                     [span for split in splits for span in split._spans])
        joined.components = tuple(Component(split.count, weight, split.components[0].chunk)
                                  for split, weight in zip(splits, weights, strict=True))
        joined._slot_bytes = sum(split._slot_bytes for split in splits)
        return joined

    def cache_window(self, window: int) -> None:
        """Enlarges the cache so that it holds a window of the order, and a third more for indices and the next window.

        Args:
          window: as of `order.batch`.
        """
        limit = min(max(CACHE_BYTES, window * self._slot_bytes * 4 // 3), LARGEST_CACHE_BYTES)
        for span in self._spans:
            span.part.set_cache(limit)

    @property
    def labeled(self) -> bool:
        """Whether all images have labels."""
        return all(span.part.labeled for span in self._spans)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images uint8 [B, Y, X, 3] of ids [B].

        Raises:
          UserError: names the split, entry and file of an image that is damaged or missing on disk.
        """
        images_BYXC = np.empty((len(ids), self.image_size, self.image_size, 3), np.uint8)
        return self._gather("images", ids, images_BYXC)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int32 [B] of ids [B].

        Raises:
          UserError: the split has no labels, or one is damaged on disk.
        """
        for part, *_ in self._spans:
            if not part.labeled:
                raise UserError(f"split {part.folder!r} of {part.path} has no labels. Prepare it from a labeled "
                                "source.")
        return self._gather("labels", ids, np.empty(len(ids), np.int32))

    def _gather(self, kind: str, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.count):
            raise IndexError(f"ids must lie in [0, {self.count})")
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        owners, reading = np.unique(owner), []
        for i in owners:  # all start to open before the first is waited for, since a bucket has a latency
            self._spans[i].part.open(kind)
        for i in owners:
            mine, span = np.flatnonzero(owner == i), self._spans[i]
            local_ids = ids[mine] - self._starts[i] + span.first
            reading.append((span.part, mine, local_ids, span.part.start(kind, local_ids)))
        for part, mine, local_ids, future in reading:
            rows[mine] = part.finish(kind, local_ids, future)
        return rows
