"""Writes a pixel store shard by shard; an interrupted writer can resume."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data.store.arrays import array_spec, create_array
from igpt_jax.data.store.manifest import PROGRESS, SPLITS, hashed, publish_manifest
from igpt_jax.data.store.reader import Split, split_of

SHARD_BYTES = 64 * 2**20
LABELS_PER_CHUNK = 2**16

# zarr's codecs
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}


class _Appended:
    """An array on disk that grows by whole shards.

    Its SHA-256 is that of the concatenated SHA-256 digests of its shards' rows. A SHA-256 over all rows could not be
    resumed, because hashlib's state cannot be saved.

    Rows are either written, in whole shards, or pending in memory. A resumed writer has the rows and digests of the
    last `state`. If the interrupted one wrote more shards after it, they are written again in the same place: the same
    rows in the same order give the same bytes. Those that the resumed writer does not reach are cut off in `finish`.
    """

    def __init__(self, path: epath.Path, rows_per_shard: int, chunk: int, dtype: str, codecs: list[dict]):
        self._path, self._rows, self.chunk, self._dtype, self._codecs = path, rows_per_shard, chunk, dtype, codecs
        self._pending: list[np.ndarray] = []
        self._array = None
        self._digests: list[str] = []
        self.count = self._written = 0

    def append(self, rows: np.ndarray) -> None:
        """Adds rows; full shards are written."""
        self._pending.append(rows)
        self.count += len(rows)
        while self.count - self._written >= self._rows:
            self._write(self._rows)

    def state(self) -> tuple[dict[str, Any], np.ndarray]:
        """The state that `restore` needs: a JSON object, and the rows not yet written."""
        pending = [np.concatenate(self._pending)] if self._pending else []
        self._pending = pending
        return {"written": self._written, "digests": self._digests}, pending[0] if pending else np.empty(0, self._dtype)

    def restore(self, state: Mapping[str, Any], pending: np.ndarray) -> None:
        """Continues an array whose `state` was saved."""
        self._written, self._digests = state["written"], list(state["digests"])
        self._pending = [pending] if len(pending) else []
        self.count = self._written + len(pending)
        if self._written:
            self._array = tensorstore.open(array_spec(self._path), open=True).result()

    def finish(self) -> str:
        """Writes the pending rows and returns the array's SHA-256, hexadecimal."""
        if self.count > self._written:
            self._write(self.count - self._written)
        if self._array is not None:  # an interrupted job may have written shards after its last save
            self._array = self._array.resize(exclusive_max=[self.count, *self._array.shape[1:]]).result()
        return hashlib.sha256("".join(self._digests).encode()).hexdigest()

    def _write(self, count: int) -> None:
        rows = np.concatenate(self._pending)
        now, later = rows[:count], rows[count:]
        # A copy, because a slice would keep all of `rows` in memory, a whole shard.
        self._pending = [later.copy()] if len(later) else []
        start, stop = self._written, self._written + count
        if self._array is None:  # the first shard sets the shard size: a small split gets a shard of its own size
            size = -(-count // self.chunk) * self.chunk
            self._array = create_array(self._path, [size, *rows.shape[1:]], self._dtype, self._codecs)
        free = [None] * (rows.ndim - 1)
        # Not shrunk here: rows beyond `stop` may be those of an interrupted writer, and `finish` sets the final length.
        self._array = self._array.resize(exclusive_max=[stop, *free], expand_only=True).result()
        self._array[start:stop].write(now).result()
        self._digests.append(hashlib.sha256(np.ascontiguousarray(now).data).hexdigest())
        self._written = stop


class Writer:
    """Writes a new store in bounded memory, one shard per split. It can be interrupted and resumed.

    Args:
      path: the store's folder. Files of an interrupted Writer are replaced, unless `resume` continues them.
      image_size: Y and X, pixels.
      chunk: images per inner chunk: 1 for local disks, about 64 for buckets, where small reads are slow.

    Raises:
      UserError: the folder has other files where the store's arrays belong, or `chunk` is too large.
    """

    def __init__(self, path: epath.Path, image_size: int, chunk: int = 1):
        self._path, self._image_size, self.chunk = path, image_size, chunk
        self._arrays: dict[str, _Appended] = {}
        self._classes = 0
        most = max(1, SHARD_BYTES // (3 * image_size**2))
        if chunk > most:  # TensorStore allocates a whole chunk, and aborts the process if it cannot
            raise UserError(f"chunk={chunk}: {chunk:,} images of {image_size}x{image_size} exceed a shard of "
                            f"{SHARD_BYTES >> 20} MiB. Set it to {most:,} or less, or to 0.")
        for split in SPLITS:
            for name in ("images", "labels"):
                array = path / split / name
                # TensorStore would empty a folder that it creates an array in.
                if array.exists() and storage.listing(array) and not (array / "zarr.json").exists():
                    raise UserError(f"workdir {path}: {split}/{name} holds files that are not a pixel store's. "
                                    "Give an empty --workdir.")

    def add(self, split: str, images_BYXC: np.ndarray, labels_B: np.ndarray | None) -> None:
        """Appends images uint8 [B, Y, X, 3] and labels int32 [B] to a split.

        Args:
          labels_B: None: unlabeled; then all images of the split must be.
        """
        size = self._image_size
        if images_BYXC.shape[1:] != (size, size, 3) or images_BYXC.dtype != np.uint8:
            raise ValueError(f"images {images_BYXC.dtype} {images_BYXC.shape} are not uint8 [B, {size}, {size}, 3]")
        images, labels = f"{split}/images", f"{split}/labels"
        if images in self._arrays and (labels_B is not None) != (labels in self._arrays):
            raise ValueError(f"split {split} mixes labeled and unlabeled images")
        for name in (images,) if labels_B is None else (images, labels):
            if name not in self._arrays:
                self._arrays[name] = self._array(name)
        self._arrays[images].append(images_BYXC)
        if labels_B is not None and len(labels_B):
            self._arrays[labels].append(labels_B.astype("<i4"))
            self._classes = max(self._classes, int(labels_B.max()) + 1)

    def _array(self, name: str) -> _Appended:
        """A new array of SPLIT/images or SPLIT/labels."""
        if name.endswith("/labels"):
            return _Appended(self._path / name, LABELS_PER_CHUNK, 1, "int32", [LITTLE, CRC32C])
        size = self._image_size
        chunk = [self.chunk, size, size, 3]
        sharded = {"chunk_shape": chunk, "codecs": [{"name": "bytes"}, CRC32C], "index_codecs": [LITTLE, CRC32C]}
        shard = max(1, SHARD_BYTES // (3 * size**2 * self.chunk)) * self.chunk
        return _Appended(self._path / name, shard, self.chunk, "uint8",
                         [{"name": "sharding_indexed", "configuration": sharded}])

    def save(self, notes: Mapping[str, Any]) -> None:
        """Writes progress.npz for `resume`, which returns `notes` (JSON)."""
        states = {name: array.state() for name, array in self._arrays.items()}
        record = {"notes": notes, "classes": self._classes, "image_size": self._image_size, "chunk": self.chunk,
                  "arrays": {name: state for name, (state, _) in states.items()}}
        data = io.BytesIO()
        np.savez(data, record=np.frombuffer(json.dumps(record).encode(), np.uint8),
                 **{name: pending for name, (_, pending) in states.items()})
        # One file holds counts, digests and pending rows, and it appears in one rename. So they always fit together.
        storage.publish(self._path / PROGRESS, data.getvalue())

    def resume(self) -> dict[str, Any] | None:
        """Continues what an interrupted Writer saved, and returns its notes; None if nothing usable was saved."""
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
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError):  # damaged: start over
            return None
        self._arrays, self._classes = arrays, record["classes"]
        return record["notes"]

    def close(self) -> dict[str, dict[str, Any]]:
        """Writes the pending rows. Returns the splits as they stand in the manifest."""
        splits = {}
        for name in [name for name in self._arrays if name.endswith("/images")]:
            split, labels = name.partition("/")[0], self._arrays.get(name.replace("images", "labels"))
            part = {"folder": split, "count": self._arrays[name].count, "sha256": self._arrays[name].finish(),
                    "labels_sha256": labels.finish() if labels else None}
            splits[split] = {"count": part["count"], "parts": [part]}
        return splits

    def split(self, name: str) -> Split:
        """A split for reading, after writing the pending rows."""
        return split_of(self._path, name, self.close(), self._image_size, self.chunk)

    def finish(self, palette_VC: np.ndarray | None, *, source: str, resize: str, seed: int, held_out: Mapping[str, Any],
               config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Writes the palette and, last, the manifest, which it returns.

        Args:
          palette_VC: float32 [V, 3]; None: the store is a slice.
          source: of the training images, as in the config.
          resize: the rule by which images were resized.
          seed: of the held-out images and the palette.
          held_out: the fraction held out, and the rule.
          config: of the prepare job.
          more: further fields of the manifest.
        """
        splits = self.close()
        fields = {"image_size": self._image_size, "chunk": self.chunk, "classes": self._classes, "splits": splits,
                  "source": source, "resize": resize, "seed": seed, "held_out": held_out, "config": config, **more}
        manifest = publish_manifest(self._path, palette_VC, fields, hashed(self._path, splits))
        (self._path / PROGRESS).unlink(missing_ok=True)
        return manifest
