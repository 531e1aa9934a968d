"""Batches for training: both readers agree, start at any step, serve any number of hosts, and clean up."""

import gc
import os
import sys
import time

import jax
import numpy as np
import pytest
from conftest import patience
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igpt_jax import data, storage
from igpt_jax.config import UserError
from igpt_jax.data import batches, order, pipeline, store
from igpt_jax.data.codecs import Palette

PALETTE_VC = np.random.default_rng(0).uniform(-1, 1, (12, 3)).astype(np.float32)
COUNT, SIZE = 50, 8


@pytest.fixture(scope="module")
def codec():
    return Palette(PALETTE_VC)


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def path(tmp_path, images):
    writer = store.Writer(storage.path(tmp_path), SIZE)
    writer.add("train", images, None)
    writer.finish(PALETTE_VC, source="test", resize="none", seed=0, held_out={}, config={})
    return tmp_path


@pytest.fixture
def split(path):
    return store.Store.open(path).split("train")


def one_device():
    return NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))


def take(split, codec, count, **options):
    options = {"reader": "resident", "seed": 3, "batch_size": 16, "start_step": 0, "sharding": one_device(),
               "prefetch": 2, **options}
    batches = data.train_batches(split, codec, **options)
    try:
        with jax.transfer_guard("disallow"):
            return [next(batches) for _ in range(count)]
    finally:
        batches.close()


@pytest.mark.parametrize("reader", ["resident", "tfdata"])
@pytest.mark.parametrize("start_step", [0, 10**9])
def test_readers_follow_the_order(split, images, codec, reader, start_step):
    """Compared with the encoded images, across epochs. Seen to fail with red and blue swapped in palette.encode, and
    with `step + 1` in resident.batches."""
    for i, batch in enumerate(take(split, codec, 5, reader=reader, start_step=start_step)):
        ids = order.batch(3, start_step + i, 16, COUNT)
        assert batch.step == start_step + i and batch.tokens.dtype == np.int32
        np.testing.assert_array_equal(batch.ids, ids)
        np.testing.assert_array_equal(batch.tokens, codec.encode(images[ids]))


def test_the_cache_holds_the_window(tmp_path, images, codec, monkeypatch):
    """Of a store in chunks. Seen to fail without cache_window in train_batches."""
    writer, windows = store.Writer(storage.path(tmp_path), SIZE, chunk=4), []
    writer.add("train", images, None)
    monkeypatch.setattr(store.Split, "cache_window", lambda split, window: windows.append(window))
    for window in (3, 0):
        take(writer.split("train"), codec, 1, reader="tfdata", window=window)
    assert windows == [3, batches.WINDOW]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_slices_of_the_same_global_batch(split, images, codec, hosts):
    """Seen to fail where each host orders batches of its own size."""
    ids, tokens = order.batch(5, 7, 16, COUNT), []
    for host in range(hosts):
        rows = slice(host * 16 // hosts, (host + 1) * 16 // hosts)
        batches = pipeline.batches(split, codec, seed=5, batch_size=16, start_step=7, rows=rows, prefetch=1)
        global_ids, mine = next(batches)
        batches.close()
        np.testing.assert_array_equal(global_ids, ids)
        tokens.append(mine)
    np.testing.assert_array_equal(np.concatenate(tokens), codec.encode(images[ids]))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_closing_ends_the_threads(split, codec):
    """Seen to fail with the iterators kept in a list in pipeline.py."""
    def threads():
        gc.collect()
        return len(os.listdir("/proc/self/task"))

    for _ in range(2):  # TensorFlow's own pools start, and stay
        take(split, codec, 2, reader="tfdata")
    before, readers = threads(), 5
    for _ in range(readers):
        take(split, codec, 2, reader="tfdata")
    deadline = time.monotonic() + patience(1)
    while threads() >= before + readers and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threads() < before + readers  # a pool of TensorFlow's may still grow: once 36 threads were left of 35


def test_a_damaged_image_stops_the_reader(path, images, codec):
    """The store's error passes through TensorFlow. Seen to fail where TensorFlow's error is raised."""
    shard = path / "train" / "images" / "c" / "0" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.find(images[order.batch(3, 1, 16, COUNT)[2]].tobytes())] ^= 1
    shard.write_bytes(damaged)
    split = store.Store.open(path).split("train")
    with pytest.raises(UserError, match="train/images entry"):
        take(split, codec, 3, reader="tfdata")


def test_a_process_that_fails_ends(run_job):
    """With tf.data's threads in the middle of a batch: Python's end stops threads that want its lock, and TensorFlow
    waits for them. Seen to hang without _close_all."""
    script = """
import time
import numpy as np
from igpt_jax.data import pipeline
from igpt_jax.data.codecs import Rgb

class Split:
    components, calls = 64, 0
    def read(self, ids):
        self.calls += 1
        time.sleep(2 * (self.calls > 1))
        return np.zeros((len(ids), 8, 8, 3), np.uint8)

def train():
    reading = pipeline.batches(Split(), Rgb(), seed=0, batch_size=8, start_step=0, rows=slice(0, 8), prefetch=2)
    next(reading)
    raise RuntimeError("stops")

train()
"""
    done = run_job(script=script)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: stops\n"), done.stderr


def test_auto_is_resident_until_it_does_not_fit(split, codec, monkeypatch):
    assert batches._reader_for(split, codec, "auto") == "resident"
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 1000)
    assert batches._reader_for(split, codec, "auto") == "tfdata"
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        batches._reader_for(split, codec, "auto")
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        batches._reader_for(split, codec, "tfdata")
    assert batches._reader_for(split, codec, "resident") == "resident"


def test_readers_agree_on_eight_devices_and_residence_needs_no_tensorflow(path, python):
    """In a process of its own: 8 devices, the batch split over two mesh axes and replicated over the third; TensorFlow
    cannot be imported for the resident reader. Seen to fail with `import tensorflow` in resident.py."""
    python("readers_agree.py", path)
