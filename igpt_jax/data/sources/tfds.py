"""Image data sets of TensorFlow Datasets (TFDS), by name or by folder."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from igpt_jax.config import UserError
from igpt_jax.data.sources import contents
from igpt_jax.data.sources.base import Item, Source, slice_of

READ_AT_ONCE, READ_BYTES = 64, 2**26  # examples, and bytes of examples of mean size


class Tfds(Source):
    """`tfds:NAME[/CONFIG][:VERSION][@SPLIT]`, or `tfds:DIR[@SPLIT]` with the folder of a prepared version.

    SPLIT is train by default. TFDS downloads and prepares the data set in $TFDS_DATA_DIR (default:
    ~/tensorflow_datasets) if it is not there yet.
    """

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        self._builder, self._split = open_builder(argument)
        self._image, self._label = keys_of(self._builder)
        self.class_names = class_names_of(self._builder)
        info = self._builder.info
        split = info.splits[self._split]
        self.contents = contents.summarize([f"{info.full_name}@{split.name}, {split.num_bytes} bytes, shards of "
                                            f"{split.shard_lengths} examples"], self.class_names)
        self._at_once = min(max(1, READ_BYTES * split.num_examples // max(1, split.num_bytes)), READ_AT_ONCE)
        self._mine = slice_of(split.num_examples, shard)
        self.count, self.sizes = len(self._mine), set()

    def items(self, start: int) -> Iterator[Item]:
        for i, example in zip(self._mine[start:], self._examples(self._mine[start:]), strict=True):
            label = None if self._label is None else int(example[self._label])
            # TFDS marks unlabeled examples, such as those of a test split, with -1.
            yield Item(f"{self._split}[{i}]", None if label == -1 else label, example[self._image])

    def _examples(self, mine: range) -> Iterator[dict[str, Any]]:
        """The examples of these indices. Raises UserError for unreadable files."""
        try:
            yield from self._read(mine)
        except Exception as error:
            raise unreadable(f"{self._builder.info.full_name}: {self._split}", error) from None

    def _read(self, mine: range) -> Iterator[dict[str, Any]]:
        import tensorflow_datasets as tfds

        if not mine:  # a resumed job has read them all; TFDS refuses to read none
            return
        decoders = {self._image: tfds.decode.SkipDecoding()}
        if _random_access(self._builder):
            source, number = self._builder.as_data_source(split=self._split, decoders=decoders), self._at_once
            for first in range(mine.start, mine.stop, number):
                yield from source.__getitems__(list(range(first, min(first + number, mine.stop))))
            return
        # TFRecord files have no index: TFDS reads them in order, without shuffling or interleaving.
        rows = tfds.core.ReadInstruction(self._split, from_=mine.start, to=mine.stop, unit="abs")
        in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = self._builder.as_dataset(split=rows, decoders=decoders, shuffle_files=False, read_config=in_order)
        yield from dataset.as_numpy_iterator()


def unreadable(name: str, error: Exception) -> UserError:
    """The error for damaged files of a data set, on which TFDS's readers raise many types."""
    text = re.sub(r"^\{\{.*\}\}|\[Op:.*\].*", "", str(error))  # TensorFlow's names of its operations
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return UserError(f"tfds:{name} cannot be read ({reason}). Restore the data set from a copy, or prepare it again in "
                     "TFDS.")


def open_builder(argument: str) -> tuple[Any, str]:
    """TFDS's builder of a data set, prepared first if necessary, and the name of the split.

    Raises:
      UserError: the data set or split does not exist, or TFDS cannot prepare it.
    """
    name, at, split = argument.rpartition("@")
    name, split = (name, split) if at else (argument, "train")
    if not name:
        raise UserError("source 'tfds' needs a name: tfds:cifar10, or tfds:NAME@SPLIT.")
    with _tfds_errors(name):
        import tensorflow_datasets as tfds

        if os.sep in name and os.path.exists(os.path.join(os.path.expanduser(name), "dataset_info.json")):
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            builder = tfds.builder(name)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
    if split not in builder.info.splits:
        raise UserError(f"tfds:{argument}: {name} has no split {split!r}. Use one of "
                        f"{', '.join(builder.info.splits)}.")
    if builder.info.splits[split].num_examples is None:
        raise UserError(f"tfds:{argument}: TFDS does not know how many examples it has. Prepare it again in TFDS.")
    return builder, split


def keys_of(builder: Any) -> tuple[str, str | None]:
    """The names of the image feature and of the class label: `label`, or the first (None if there is none)."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if len(images) != 1:
        raise UserError(f"tfds:{builder.name} has {len(images)} image features ({', '.join(features)}). Use a data set "
                        "with one.")
    return images[0], "label" if "label" in labels else labels[0] if labels else None


def class_names_of(builder: Any) -> tuple[str, ...]:
    """The class names by class number; empty if unlabeled."""
    _, label = keys_of(builder)
    return tuple(builder.info.features[label].names or ()) if label else ()


def _random_access(builder: Any) -> bool:
    return builder.info.file_format is not None and builder.info.file_format.value == "array_record"


@contextlib.contextmanager
def _tfds_errors(name: str) -> Iterator[None]:
    """Turns the errors of opening and preparing a data set into a UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"tfds:{name} needs tensorflow_datasets ({error}). Install it with pip.") from None
    except Exception as error:  # TFDS raises many types, such as AssertionError for a manual download
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"tfds:{name} cannot be opened or prepared ({reason}). Check the name against TFDS's catalog; "
                        "some data sets have to be downloaded by hand into $TFDS_DATA_DIR/downloads/manual.") from None
