"""Compares the pixels of training and of prepare on a TFDS data set: python tfds_pixels.py FOLDER. Damages it then."""

import pathlib
import sys

import numpy as np

from igpt_jax import data
from igpt_jax.config import DataConfig, UserError
from igpt_jax.data import codecs, images, pipeline, sources

COUNT, GOOD = 12, 9


def error_of(read) -> str:
    """The message of the UserError that `read` raises."""
    try:
        read()
    except UserError as error:
        return str(error)
    raise AssertionError("no error was raised")


def check_pixels(split, items: dict) -> None:
    good = 0
    for i, (name, _) in enumerate(split.pictures(np.arange(COUNT))):
        try:
            expected, reason = images.decode(items[name], 16), ""
        except images.Unusable as error:
            reason = str(error)
        try:
            assert np.array_equal(split.read(np.array([i]))[0], expected) and not reason, name
            good += 1
        except UserError as error:
            assert reason and f": {name}: {reason}. Leave it out" in str(error), (reason, error)
    assert good == GOOD, good


def main(folder: str) -> None:
    path = f"{folder}/array_record/odd/1.0.0"
    split = data.open_data(DataConfig(store=f"tfds:{path}"), 16).split("train+held_out")
    items = {item.name: item.content for item in sources.open_source(f"tfds:{path}", 16, 0).items(0)}
    assert sorted(items) == sorted(name for name, _ in split.pictures(np.arange(COUNT)))
    check_pixels(split, items)

    reading = pipeline.batches(split, codecs.Rgb(), seed=0, batch_size=COUNT, start_step=0,
                               rows=slice(0, COUNT), prefetch=1, augment="imagenet")
    for read in (lambda: split.read(np.arange(COUNT)), lambda: next(reading)):
        assert "Leave it out" in error_of(read)
    assert "has no labels" in error_of(lambda: split.labels(np.arange(COUNT)))

    for file in pathlib.Path(path).glob("*array_record*"):
        file.write_bytes(bytes(file.stat().st_size))
    for read in (lambda: split.read(np.array([3])), lambda: list(sources.open_source(f"tfds:{path}", 16, 0).items(0))):
        message = error_of(read)
        assert "cannot be read (" in message and "\n" not in message, message


main(sys.argv[1])
