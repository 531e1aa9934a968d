"""Data sets of TFDS in ArrayRecord files, read by index: pictures of their own sizes, decoded and cropped as needed.

Same interface as a pixel store's. Dimensions: B batch; Y rows, X columns, C channels.
"""

import hashlib
import json

import numpy as np
import tensorflow as tf

from igpt_jax.config import UserError, nearest
from igpt_jax.data import jpeg, order
from igpt_jax.data.order import Component
from igpt_jax.data.sources.tfds import class_names_of, keys_of, open_builder


class Records:
    """`tfds:NAME[@SPLIT]` as a store with the splits train, held_out and those of TFDS itself.

    Held out are the paper's shares of the training images: 0.04 for ImageNet, else 0.1; which, by the rule of the
    prepare job with seed 0.

    Args:
      typed: with `tfds:`.
      image_size: Y and X of the images read, pixels.

    Raises:
      UserError: no such data set, or not in ArrayRecord files.
    """
    palette = None  # JPEGs have none: the config names one

    def __init__(self, typed: str, image_size: int):
        if not image_size:
            raise UserError(f"data.store={typed} holds pictures of any size. Set image_size to the model's.")
        self._builder, self._train = open_builder(typed.removeprefix("tfds:"))
        file_format = self._builder.info.file_format
        if file_format is None or file_format.value != "array_record":
            raise UserError(f"data.store={typed} is stored as {file_format and file_format.value}, which cannot be "
                            'read by index. Prepare it in TFDS with file_format="array_record".')
        self.path, self.image_size = typed, image_size
        self._held_out = 0.04 if "imagenet" in self._builder.name else 0.1
        self.classes = len(class_names_of(self._builder))

    def split(self, names: str) -> "RecordSplit":
        """`train`, `held_out`, a split of TFDS's own, or several joined with +.

        Raises:
          UserError: no such split, or an empty one.
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
    """Pictures of one split or several joined, by id in [0, count). Attributes as of store.Split."""

    def __init__(self, builder, name: str, rows: list[tuple[str, np.ndarray]], image_size: int):
        import tensorflow_datasets as tfds

        self.name, self.image_size = name, image_size
        self.count = sum(len(ids) for _, ids in rows)
        self.components = (Component(self.count),)
        self._image, self._label = keys_of(builder)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._rows = [(builder.as_data_source(split=own, deserialize_method=raw), ids) for own, ids in rows]
        for source, ids in self._rows:  # a damaged ArrayRecord file says that it has no records
            if len(source) <= ids[-1]:
                raise UserError(f"{builder.info.full_name}: its files hold {len(source):,} records, and its record "
                                f"says {ids[-1] + 1:,} or more. Prepare it again in TFDS.")
        self._starts = np.cumsum([0, *(len(ids) for _, ids in rows)])
        self._features = {self._image: tf.io.FixedLenFeature([], tf.string)}
        if self._label:
            self._features[self._label] = tf.io.FixedLenFeature([], tf.int64)
        contents = [builder.info.full_name, [[own, hashlib.sha256(ids.tobytes()).hexdigest()] for own, ids in rows],
                    [[split.name, split.shard_lengths, split.num_bytes] for split in builder.info.splits.values()]]
        self.fingerprint = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        self._decode = tf.function(lambda data: tf.map_fn(
            lambda one: jpeg.decode(one, tf.zeros(3, tf.float64), image_size, random=False), data,
            fn_output_signature=tf.uint8))

    def examples(self, ids: np.ndarray) -> list[bytes]:
        """The serialized tf.train.Example of each id."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        found: list[bytes] = [b""] * len(ids)
        for i in np.unique(owner):
            place = np.flatnonzero(owner == i)
            source, rows = self._rows[i]
            wanted = rows[ids[place] - self._starts[i]].tolist()
            for at, record in zip(place, source.__getitems__(wanted), strict=True):
                found[at] = record
        return found

    def pictures(self, examples: tf.Tensor) -> tf.Tensor:
        """The encoded pictures, string [B], in serialized examples, string [B]."""
        return tf.io.parse_example(examples, {self._image: self._features[self._image]})[self._image]

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images uint8 [B, Y, X, 3] of ids [B]: the centre crop of evaluation."""
        with tf.device("cpu"):
            return self._decode(self.pictures(tf.constant(self.examples(ids)))).numpy()

    @property
    def labelled(self) -> bool:
        """Whether all its images have labels."""
        return bool(self._label)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels int32 [B] of ids [B]. Raises UserError where there are none."""
        if not self._label:
            raise UserError(f"split {self.name!r} has no labels. Use a labelled data set.")
        with tf.device("cpu"):
            return tf.io.parse_example(self.examples(ids), self._features)[self._label].numpy().astype(np.int32)
