"""Compares random crops of a TFDS data set with Pillow's: python tfds_crops.py FOLDER."""

import io
import sys

import numpy as np
from PIL import Image

from igpt_jax import data
from igpt_jax.config import DataConfig
from igpt_jax.data import augmentation, codecs, order, pipeline


class GreenAndBlue(codecs.Palette):
    """A token is a color's green and blue."""
    table = np.arange(2**24, dtype=np.uint16)


CODEC = GreenAndBlue(np.zeros((2**16, 3), np.float32))


def check_windows() -> None:
    draws = augmentation.unit_draws(3, np.arange(2000), 3)
    left, top, side = np.array([augmentation.window(one, 16, 140, 100) for one in draws[:500]]).T
    assert side.min() == round(224 / 384 * 100) and side.max() == round(224 / 256 * 100)
    assert top.min() == 0 and left.min() == 0 and (top + side).max() == 100 and (left + side).max() == 140
    assert {augmentation.window(one, 16, 20, 16)[2] for one in draws} == {16}  # nothing is enlarged


def tokens(split, start: int, rows: slice) -> np.ndarray:
    """Tokens of three steps from `start`, [3, R, T]."""
    reading = pipeline.batches(split, CODEC, seed=3, batch_size=8, start_step=start, rows=rows, prefetch=1,
                               augment="imagenet")
    found = [next(reading) for _ in range(3)]
    reading.close()
    return np.stack([tokens_RT for _, tokens_RT in found])


def main(folder: str) -> None:
    store = data.open_data(DataConfig(store=f"tfds:{folder}/array_record/pictures/1.0.0"), 16)
    train, held_out, validation = (store.split(name) for name in ("train", "held_out", "validation"))
    assert (train.count, held_out.count, validation.count, store.classes) == (36, 4, 7, 3)
    both = store.split("train+held_out")
    pictures = [content for _, content in both.pictures(np.arange(40))]
    assert len(set(pictures)) == 40
    decoded = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    assert both.labels(np.arange(40)).tolist().count(0) == 14

    check_windows()
    whole = tokens(both, 0, slice(0, 8))
    for hosts in (2, 4, 8):
        slices = [tokens(both, 0, slice(i * 8 // hosts, (i + 1) * 8 // hosts)) for i in range(hosts)]
        assert np.array_equal(np.concatenate(slices, 1), whole)
    assert np.array_equal(tokens(both, 2, slice(0, 8))[0], whole[2])
    for step in range(3):
        ids, draws = order.batch(3, step, 8, both.components), augmentation.unit_draws(3, step * 8 + np.arange(8), 3)
        for row in range(8):
            left, top, side = augmentation.window(draws[row], 16, *decoded[ids[row]].size)
            crop = decoded[ids[row]].crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BOX)
            expected = np.asarray(crop).astype(int)[..., 1]
            assert np.abs((whole[step, row] >> 8).reshape(16, 16) - expected).max() <= 1


main(sys.argv[1])
