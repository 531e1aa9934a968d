"""Reads TFDS data sets in ArrayRecord files by index, and decodes and crops their pictures as needed.

The interface is that of a pixel store, and so are the pixels, because both use `images.decode`. There is no quarantine
here: an unusable picture ends the run with an error that names it.

Dimensions: B batch; Y rows, X columns, C channels.
"""

import concurrent.futures
import functools
import hashlib
import os

import numpy as np
import tensorflow as tf

from igpt_jax.config import UserError, nearest
from igpt_jax.data import augmentation, images, order
from igpt_jax.data.order import Component
from igpt_jax.data.sources.tfds import class_names_of, keys_of, open_builder, unreadable
from igpt_jax.storage.hashes import json_digest


class Records:
    """`tfds:NAME[@SPLIT]` as a store with the splits train, held_out and TFDS's own.

    held_out has the paper's fraction of the training images: 0.04 for ImageNet, else 0.1. The rule that chooses them is
    the prepare job's, with seed 0.

    Args:
      path: `tfds:NAME[@SPLIT]`.
      image_size: Y and X of the images read, pixels.

    Raises:
      UserError: the data set does not exist, or is not in ArrayRecord files.
    """
    palette = None  # the config has to name one

    def __init__(self, path: str, image_size: int):
        if not image_size:
            raise UserError(f"data.store={path} has pictures of different sizes. Set image_size, such as "
                            "--config.image_size=32.")
        self._builder, self._train = open_builder(path.removeprefix("tfds:"))
        file_format = self._builder.info.file_format
        if file_format is None or file_format.value != "array_record":
            raise UserError(f"data.store={path} is stored as {file_format and file_format.value}, which cannot be "
                            'read by index. Prepare it in TFDS with file_format="array_record".')
        self.path, self.image_size = path, image_size
        self._held_out = 0.04 if "imagenet" in self._builder.name else 0.1
        self.classes = len(class_names_of(self._builder))

    def split(self, names: str) -> "RecordSplit":
        """`train`, `held_out`, a split of TFDS's own, or several joined with +.

        Raises:
          UserError: a split does not exist or is empty.
        """
        rows = []
        for name in names.split("+"):
            of_train = name in ("train", "held_out")
            own = self._train if of_train else name
            if own not in self._builder.info.splits:
                known = ["train", "held_out", *self._builder.info.splits]
                raise UserError(f"split {name!r} is not in {self.path}. {nearest(name, known)}")
            count = self._builder.info.splits[own].num_examples
            ids = np.arange(count)
            if of_train:
                out = order.permute(ids, count, seed=0, epoch=0) < round(self._held_out * count)
                ids = ids[out == (name == "held_out")]
            if not len(ids):
                raise UserError(f"split {name!r} of {self.path} is empty. Name another.")
            rows.append((own, ids))
        return RecordSplit(self._builder, names, rows, self.image_size)


class RecordSplit:
    """Pictures of one split or several joined, by id in [0, count). Attributes as of store.Split.

    `rows` lists, for each split of TFDS, the indices of its examples that belong to this split.
    """

    def __init__(self, builder, name: str, rows: list[tuple[str, np.ndarray]], image_size: int):
        import tensorflow_datasets as tfds

        self.name, self.image_size = name, image_size
        self.count = sum(len(ids) for _, ids in rows)
        self.components = (Component(self.count),)
        self._image, self._label = keys_of(builder)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._rows = [(builder.as_data_source(split=own, deserialize_method=raw), ids) for own, ids in rows]
        for source, ids in self._rows:  # a damaged ArrayRecord file reads as if it had no records
            if len(source) <= ids[-1]:
                raise UserError(f"{builder.info.full_name}: its files have {len(source):,} records; its metadata say "
                                f"{ids[-1] + 1:,} or more. Prepare it again in TFDS.")
        self._starts = np.cumsum([0, *(len(ids) for _, ids in rows)])
        self._names, self._path = [own for own, _ in rows], builder.info.full_name
        contents = [builder.info.full_name, [[own, hashlib.sha256(ids.tobytes()).hexdigest()] for own, ids in rows],
                    [[split.name, split.shard_lengths, split.num_bytes] for split in builder.info.splits.values()],
                    images.RESIZE_RULE]
        self.fingerprint = json_digest(contents, length=64)
        self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def _examples(self, ids: np.ndarray) -> list[tuple[str, tf.train.Features]]:
        """Name and features of the example of each id."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        found: list = [None] * len(ids)
        for i in np.unique(owner):
            mine = np.flatnonzero(owner == i)
            source, rows = self._rows[i]
            wanted = rows[ids[mine] - self._starts[i]].tolist()
            try:
                records = source.__getitems__(wanted)
                for position, row, record in zip(mine, wanted, records, strict=True):
                    found[position] = f"{self._names[i]}[{row}]", tf.train.Example.FromString(record).features
            except Exception as error:
                more = f" and {len(wanted) - 1:,} more" if len(wanted) > 1 else ""
                raise unreadable(f"{self._path}: {self._names[i]}[{wanted[0]}]{more}", error) from None
        return found

    def pictures(self, ids: np.ndarray) -> list[tuple[str, bytes]]:
        """Name and encoded content of the picture of each id."""
        return [(name, features.feature[self._image].bytes_list.value[0]) for name, features in self._examples(ids)]

    def read(self, ids: np.ndarray, draws_B3: np.ndarray | None = None) -> np.ndarray:
        """Images uint8 [B, Y, X, 3] of ids [B].

        Args:
          draws_B3: random crops, from augmentation.unit_draws; None: the largest centered squares.

        Raises:
          UserError: a picture cannot be used.
        """
        def one(picture: tuple[str, bytes], draws_3: np.ndarray | None) -> np.ndarray:
            window = None if draws_3 is None else functools.partial(augmentation.window, draws_3, self.image_size)
            try:
                return images.decode(picture[1], self.image_size, window)
            except images.Unusable as reason:
                raise UserError(f"tfds:{self._path}: {picture[0]}: {reason}. Leave it out when you build the data "
                                "set in TFDS, or run prepare, which leaves such pictures out.") from None

        draws = [None] * len(ids) if draws_B3 is None else draws_B3
        return np.stack(list(self._threads.map(one, self.pictures(ids), draws)))

    @property
    def labeled(self) -> bool:
        """Whether all images have labels."""
        return bool(self._label)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int32 [B] of ids [B]. Raises UserError if there are none."""
        labels_B = [features.feature[self._label].int64_list.value[0] for _, features in self._examples(ids)
                    ] if self._label else [-1]
        if min(labels_B) < 0:  # TFDS's mark of an unlabeled example
            raise UserError(f"split {self.name!r} has no labels. Use a labeled data set.")
        return np.array(labels_B, np.int32)
