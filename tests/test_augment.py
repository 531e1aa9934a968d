"""Shifts, crops and mirrors: compared with NumPy's padding, and between readers, hosts and resumed runs."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igpt_jax import data, storage
from igpt_jax.config import DataConfig, UserError
from igpt_jax.data import augmentation, order, pipeline, resident, store
from igpt_jax.data.codecs import Palette

PALETTE_VC = np.random.default_rng(0).uniform(-1, 1, (12, 3)).astype(np.float32)
FIELDS = {"source": "test", "resize": "none", "seed": 0, "held_out": {}, "config": {}}


@pytest.fixture(scope="module")
def codec():
    return Palette(PALETTE_VC)


def write(path, count, seed, chunk=1, size=8):
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    writer = store.Writer(storage.path(path), size, chunk)
    writer.add("train", images, None)
    writer.finish(PALETTE_VC, **FIELDS)
    return images


def test_crop_and_mirror_against_numpy():
    """Reflect-pad by 4, one of 81 crops, mirrored or not; all combinations occur. Seen to fail with edge padding, and
    without mirrors."""
    image = np.arange(256).reshape(16, 16)
    rows, columns = augmentation.crop_and_mirror(5, np.arange(4000), 16)

    def crops(image):
        padded = np.pad(image, 4, mode="reflect")
        return {padded[top:top + 16, left:left + 16].tobytes() for top in range(9) for left in range(9)}

    made = [image[rows[i]][:, columns[i]].tobytes() for i in range(4000)]
    assert set(made) == crops(image) | crops(image[:, ::-1]) and len(set(made)) == 162
    assert abs(np.mean([one in crops(image) for one in made[:500]]) - 0.5) < 0.1


def test_shift_against_numpy():
    """Pad by 1 with the black token, one of 9 crops, no mirror; each occurs equally often. Seen to fail with a pad of
    0 in place of black, with two draws swapped, and with `% 2`."""
    image = np.arange(64, dtype=np.uint16).reshape(8, 8)
    padded = np.pad(image, 1, constant_values=77)
    crops = [padded[top:top + 8, left:left + 8].reshape(-1) for top in range(3) for left in range(3)]
    images = np.broadcast_to(image.reshape(-1), (9000, 64))
    codec = SimpleNamespace(channels=1, black=77)
    made = augmentation.augmented("shift", images, 5, np.arange(9000), codec)
    counts = [(made == crop).all(axis=1).sum() for crop in crops]
    assert made.dtype == np.uint16 and sum(counts) == 9000 and min(counts) > 900
    top, left = (order.draws(5, np.arange(9), 2) % 3).T
    np.testing.assert_array_equal(made[:9], [crops[3 * int(y) + int(x)] for y, x in zip(top, left, strict=True)])
    np.testing.assert_array_equal(augmentation.augmented("shift", images[:2], 5, np.arange(7, 9), codec), made[7:9])


def batches_of(split, codec, **options):
    sharding = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    return data.train_batches(split, codec, **{"seed": 3, "batch_size": 16, "start_step": 0, "sharding": sharding,
                                               "prefetch": 2, **options})


@pytest.mark.parametrize("augment", ["none", "shift", "cifar"])
@pytest.mark.parametrize("reader", ["resident", "tfdata"])
def test_readers_hosts_and_resumes_agree(tmp_path, codec, augment, reader):
    """A mixture of two stores, with chunks and windows: each batch is compared with NumPy, from the start and from the
    middle, and on 1, 2, 4 and 8 simulated hosts; digests of epochs agree. Seen to fail with positions counted from the
    host's first row, in either reader."""
    pixels = np.concatenate([write(tmp_path / "a", 30, 1), write(tmp_path / "b", 50, 2, chunk=8)])
    config = DataConfig(store=f"{tmp_path}/a,{tmp_path}/b", weights=(1, 2))
    split = data.open_data(config).split("train")
    tokens = codec.encode(pixels).reshape(-1, 8, 8)

    def expected(step):
        ids, positions = order.batch(3, step, 16, split.components, 2), step * 16 + np.arange(16)
        if augment == "none":
            return ids, tokens[ids].reshape(16, -1)
        if augment == "shift":
            return ids, augmentation.augmented("shift", tokens[ids].reshape(16, -1), 3, positions, codec)
        rows, columns = augmentation.crop_and_mirror(3, positions, 8)
        return ids, np.stack([tokens[i][r][:, c] for i, r, c in zip(ids, rows, columns, strict=True)]).reshape(16, -1)

    digests = []
    for start in (0, 5):
        batches = batches_of(split, codec, reader=reader, augment=augment, window=2, start_step=start)
        for step in range(start, 12):
            batch = next(batches)
            ids, wanted = expected(step)
            np.testing.assert_array_equal(batch.ids, ids)
            np.testing.assert_array_equal(batch.tokens, wanted)
        digests.append({epoch: digest for *epoch, digest in map(list, batches.epochs) for epoch in [tuple(epoch)]})
        batches.close()
    assert digests[0].items() >= digests[1].items() and len(digests[1]) >= 1
    module, ahead = (resident, {}) if reader == "resident" else (pipeline, {"prefetch": 1})
    for hosts in (1, 2, 4, 8):
        slices = []
        for host in range(hosts):
            rows = slice(host * 16 // hosts, (host + 1) * 16 // hosts)
            reading = module.batches(split, codec, seed=3, batch_size=16, start_step=7, rows=rows, augment=augment,
                                     window=2, **ahead)
            slices.append(next(reading)[1])
            reading.close()
        np.testing.assert_array_equal(np.concatenate(slices), expected(7)[1])


def test_invalid_combinations(tmp_path, codec):
    write(tmp_path / "a", 30, 1)
    write(tmp_path / "large", 10, 1, size=16)
    write(tmp_path / "tiny", 10, 1, size=4)
    for options, message in (({"store": f"{tmp_path}/a,{tmp_path}/large"}, "8, 16 pixels"),
                             ({"store": f"{tmp_path}/a,{tmp_path}/a", "weights": (1,)}, "one weight for each"),
                             ({"store": f"{tmp_path}/a", "weights": (0,)}, "must be integers"),
                             ({"store": f"{tmp_path}/a", "augment": "flip"}, "not known")):
        with pytest.raises(UserError, match=message):
            data.open_data(DataConfig(**options))
    for name, augment, message in (("a", "imagenet", "whole pictures"), ("tiny", "cifar", "too small")):
        with pytest.raises(UserError, match=message):
            batches_of(store.Store.open(tmp_path / name).split("train"), codec, reader="tfdata", augment=augment)


def test_waiting_is_measured(tmp_path, codec, monkeypatch):
    """The caller works for 3 of 4 seconds. Seen to fail with the total time in place of the time in `next`."""
    write(tmp_path, 30, 1)
    batches = batches_of(store.Store.open(tmp_path).split("train"), codec, reader="resident")
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    batches.metrics()

    def slow():
        clock[0] += 1
        return data.Batch(0, np.arange(4), None)

    batches._batches = iter(slow, None)
    for _ in range(5):
        next(batches)
        clock[0] += 3
    assert batches.metrics()["input/wait_fraction"] == 0.25
