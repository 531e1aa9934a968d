"""Batches for training, from pixel stores or TFDS, in an order that is a function of (seed, step).

Dimensions: B batch, T tokens.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from igpt_jax import storage
from igpt_jax.config import DataConfig, UserError
from igpt_jax.data import augmentation, resident, staging
from igpt_jax.data.codecs import Codec
from igpt_jax.data.epoch_checker import EpochChecker
from igpt_jax.data.resident import process_rows, put
from igpt_jax.data.store import Split, Store

__all__ = ["Batch", "Batches", "count_classes", "open_data", "open_split", "process_rows", "put",
           "train_batches"]

RESIDENT_BYTES = 256 * 2**20
WINDOW = 1024  # chunks; with 64 images of 32x32 each they take 192 MiB


def open_data(config: DataConfig, image_size: int = 0):
    """Opens `data.store`: a Store, a Mixture of several stores, or Records.

    Args:
      config: the job's keys of training data.
      image_size: that the config asks for, pixels; 0: the store's.

    Raises:
      UserError: a store is missing, damaged or of another size, or the stores cannot be mixed.
    """
    if config.store.startswith("tfds:"):
        if config.stage:
            raise UserError("data.stage copies pixel stores; TFDS data sets are read in place. Leave data.stage empty.")
        from igpt_jax.data.records import Records  # TensorFlow

        return Records(config.store, image_size)
    names = storage.patterns(config.store) or [""]
    opened = [Store.open(staging.stage(name, config.stage) if config.stage else name) for name in names]
    sizes = {store.image_size for store in opened} | ({image_size} if image_size else set())
    if len(sizes) > 1:
        held = f"{config.store} holds images of {', '.join(str(store.image_size) for store in opened)} pixels"
        raise UserError(f"image_size={image_size}: the store {held}. Prepare a store of that size, or leave "
                        "image_size=0." if image_size else f"the mixture {held}. Mix stores of one size.")
    weights = config.weights or (1,) * len(opened)
    if len(weights) != len(opened):
        raise UserError(f"data.weights={weights}: the number of stores is {len(opened)}. Give one weight for each.")
    return opened[0] if len(opened) == 1 else Mixture(opened, weights)


def open_split(names: str, split: str, image_size: int) -> Split:
    """Opens a split for a model of `image_size`.

    Args:
      names: a value of `data.store`.
      split: the split, or several joined with +.
      image_size: pixels.

    Raises:
      UserError: as `open_data` and `Store.split`.
    """
    data = open_data(DataConfig(store=names, split=split, held_out=""), image_size)
    try:
        return data.split(split)
    except UserError as error:
        raise UserError(f"{error}{'' if split == 'train' else ' Or choose here: --config.data.split=train'}") from None


def count_classes(store, split) -> int:
    """The number of classes of a store, for training a classifier on `split`.

    Raises:
      UserError: the split has no labels, a single class, or a class without examples; or the stores of a mixture number
        their classes differently.
    """
    if len(names := getattr(store, "class_names", ())) > 1:
        number = next((i for i, pair in enumerate(zip(*names[:2], strict=False)) if pair[0] != pair[1]), None)
        difference = (f"{len(names[0]):,} and {len(names[1]):,} classes" if number is None else
                      f"class {number} is {names[0][number]!r} and {names[1][number]!r}")
        raise UserError(f"the stores {store.path} number their classes differently: {difference}. Prepare them "
                        "from sources with the same classes.")
    if hasattr(split, "pictures"):  # TFDS: reading all labels would mean reading all pictures
        found = range(store.classes)
    else:
        found = np.unique(split.labels(np.arange(split.count)))  # bincount would need memory up to the largest label
    if len(found) < 2:
        raise UserError(f"the labels of split {split.name!r} are all the same. Use a store with two or more classes.")
    if len(found) < store.classes:
        missing = next((i for i, label in enumerate(found) if i != label), len(found))
        raise UserError(f"class {missing} has no example in split {split.name!r}, whose {len(found):,} labels run from "
                        f"{found[0]} to {found[-1]}. Number the classes 0, 1, 2, ... without a gap, and prepare a "
                        "store whose training split has every class.")
    return store.classes


class Mixture:
    """Several stores read as one; training batches take `weights` images of each store in turn. Interface of Store."""

    def __init__(self, stores: list[Store], weights: tuple[int, ...]):
        self._stores, self._weights = stores, weights
        self.path = ",".join(str(store.path) for store in stores)
        self.image_size, self.classes = stores[0].image_size, max(store.classes for store in stores)
        self.class_names = sorted({tuple(store.manifest.get("class_names", ())) for store in stores} - {()})
        same = all(np.array_equal(store.palette, stores[0].palette) for store in stores)
        self.palette = stores[0].palette if same else None

    def split(self, names: str) -> Split:
        """The split `names` of every store, mixed, joined of those that it has. Raises UserError for a name that no
        store has."""
        pairs, missing = [], set(names.split("+"))
        for store, weight in zip(self._stores, self._weights, strict=True):
            if has := [name for name in names.split("+") if name in store.manifest["splits"]]:
                pairs.append((store.split("+".join(has)), weight))
                missing -= set(has)
        for name in sorted(missing):
            self._stores[0].split(name)
        mixed = Split.mixed(*zip(*pairs, strict=True))
        mixed.name = names
        return mixed


class Batch(NamedTuple):
    """The examples of one step.

    Attributes:
      step: from 0.
      ids: of the global batch's examples in the split, int64 [B]; the same on every process.
      tokens: int32 [B, T], sharded.
      labels: int32 [B], sharded; None if not requested.
    """
    step: int
    ids: np.ndarray
    tokens: jax.Array
    labels: jax.Array | None = None


class Batches:
    """Endless iterator of Batch. It checks that epochs are exact and measures how long the caller waits for data."""

    def __init__(self, batches: Iterator[Batch], checker: EpochChecker):
        self._batches, self._checker = batches, checker
        self._waited, self._since = 0.0, time.perf_counter()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        self._checker.add(batch.ids)
        self._waited += time.perf_counter() - start
        return batch

    @property
    def epochs(self) -> list[tuple[int, int, int]]:
        """(component, epoch, digest) of each full epoch read; all were found exact."""
        return self._checker.epochs

    def metrics(self) -> dict[str, float]:
        """The fraction of time since the last call that the caller waited, and the number of exact epochs so far."""
        now = time.perf_counter()
        fraction = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return {"input/wait_fraction": fraction, "input/exact_epochs": len(self.epochs)}

    def close(self) -> None:
        """Stops reading."""
        self._batches.close()


def train_batches(split: Split, codec: Codec, *, reader: str, seed: int, batch_size: int, start_step: int,
                  sharding: NamedSharding, prefetch: int, augment: str = "none", window: int = 0,
                  labeled: bool = False) -> Batches:
    """Training batches from `start_step` on. Both readers return the same ids and tokens.

    Args:
      split: to train on.
      codec: encodes the pixels.
      reader: `tfdata`, `resident`, or `auto`: resident if the tokens take at most 256 MiB.
      seed: of the order.
      batch_size: B, images over all processes; must be divisible by the shards of the batch dim.
      start_step: any step; seeking is free.
      sharding: of tokens [B, T]; each process reads only the rows that its devices hold.
      prefetch: batches that tfdata reads ahead.
      augment: value of the key data.augment.
      window: chunks whose examples are shuffled together, in stores with several images per chunk; 0: WINDOW.
      labeled: whether to return labels.

    Raises:
      UserError: TensorFlow is needed and not installed, or the augment cannot be used with the split; while iterating:
        an image is damaged on disk.
    """
    if augment == "imagenet" and not hasattr(split, "pictures"):
        raise UserError("data.augment=imagenet crops whole pictures, which a pixel store does not have. Set "
                        "data.store=tfds:NAME, or data.augment=cifar.")
    if augment == "cifar" and split.image_size <= augmentation.PAD:
        raise UserError(f"data.augment=cifar pads by {augmentation.PAD} pixels: images of {split.image_size} pixels "
                        "are too small. Set data.augment=none.")
    options = {"seed": seed, "batch_size": batch_size, "start_step": start_step, "augment": augment,
               "window": window or WINDOW, "rows": process_rows(sharding, batch_size)}
    if _reader_for(split, codec, reader, augment) == "resident":
        read = resident.batches(split, codec, **options)
    else:
        from igpt_jax.data import pipeline  # TensorFlow: 5 seconds and 665 MiB

        if any(component.chunk > 1 for component in split.components):
            split.cache_window(options["window"])
        read = pipeline.batches(split, codec, prefetch=prefetch, **options)
    placed = _on_devices(read, sharding, batch_size, start_step, _labels_of(split) if labeled else None)
    return Batches(placed, EpochChecker(seed, start_step * batch_size, split.components, options["window"]))


def _reader_for(split: Split, codec: Codec, reader: str, augment: str = "none") -> str:
    size = np.dtype(codec.dtype).itemsize * split.count * split.image_size**2 * codec.channels
    if augment == "imagenet":
        if reader == "resident":
            raise UserError("data.augment=imagenet decodes each picture anew. Set data.reader=tfdata.")
        return "tfdata"
    if reader == "auto" and size <= RESIDENT_BYTES:
        return "resident"
    if reader != "resident" and importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"data.reader={reader}: {size / 2**20:,.0f} MiB of tokens need TensorFlow, which is not "
                        "installed. Run `pip install tensorflow-cpu`, or set data.reader=resident.")
    return "tfdata" if reader == "auto" else reader


def _on_devices(read: Iterator[tuple[np.ndarray, np.ndarray]], sharding: NamedSharding, batch_size: int,
                start_step: int, labels_of: Callable[[np.ndarray], np.ndarray] | None) -> Iterator[Batch]:
    rows = process_rows(sharding, batch_size)
    with contextlib.closing(read):
        for step, (ids, tokens) in enumerate(read, start_step):
            labels = put(labels_of(ids[rows]), sharding, batch_size) if labels_of else None
            yield Batch(step, ids, put(tokens, sharding, batch_size), labels)


def _labels_of(split: Split) -> Callable[[np.ndarray], np.ndarray]:
    """A function from ids to labels. Labels of a pixel store are kept in memory; those of TFDS are read again."""
    return split.labels if hasattr(split, "pictures") else split.labels(np.arange(split.count)).__getitem__
