"""Measures the input pipelines, TensorFlow's bare JPEG decoder and Hugging Face's image processor in images per second.

    python benchmarks/data.py --store=runs/cifar10 [--output=data.json]

`--store` is a pixel store; the default is one of synthetic 32x32 pictures in a temporary folder. JPEGs are synthetic
too, 256 to 384 pixels a side, in ArrayRecord files written by TFDS. All rows run in one process, in turns, for three
rounds; each figure is a median. The last column is the share of the row's limit, if it has one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import exits
import jax
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from igpt_jax import data
from igpt_jax.config import DataConfig, PrepareConfig
from igpt_jax.data import pipeline
from igpt_jax.data.codecs import Palette
from igpt_jax.jobs import prepare

ROUNDS, SECONDS = 3, 2.0
PICTURES, SHORTEST, LONGEST = 256, 256, 384


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Synthetic JPEGs with the detail of photographs, about 40 KB each."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(encoding_format="jpeg")}))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(PICTURES):
            rng = np.random.default_rng(i)
            width, height = (int(side) for side in rng.integers(SHORTEST, LONGEST + 1, 2))
            layers = [np.asarray(Image.fromarray(rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3),
                                                              np.uint8)).resize((width, height), 3), np.float32)
                      for scale in (40, 12, 4)]
            yield i, {"image": np.rint(layers[0] * 0.6 + layers[1] * 0.3 + layers[2] * 0.1).astype(np.uint8)}


def rate(batches: Iterator, images: int) -> tuple[float, float]:
    """Images per second and CPU seconds per image (all threads), in batches of `images`, after a warm-up."""
    for _ in range(8):
        next(batches)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - start) < SECONDS:
        next(batches)
        count += images
    cpu = time.process_time() - cpu
    if hasattr(batches, "close"):
        batches.close()
    return count / seconds, cpu / count


def bare_decode(split, batch_size: int) -> Iterator:
    """tf.image's decoder on the same files, whole pictures, and nothing else."""
    files = tf.data.Dataset.from_tensor_slices([data for _, data in split.pictures(np.arange(split.count))]).repeat()
    decoded = files.map(lambda one: tf.shape(tf.image.decode_jpeg(one, channels=3, dct_method="INTEGER_ACCURATE")),
                        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return decoded.batch(batch_size).prefetch(4).as_numpy_iterator()


def read_and_decode(split, batch_size: int) -> Iterator:
    """The same, but each batch's records are first read from the files, in order."""
    def read(step: np.int64) -> np.ndarray:
        ids = (step * batch_size + np.arange(batch_size)) % split.count
        return np.array([data for _, data in split.pictures(ids)], object)

    read_batches = tf.data.Dataset.range(tf.int64.max).map(
        lambda step: tf.ensure_shape(tf.numpy_function(read, [step], tf.string), [batch_size]),
        num_parallel_calls=2, deterministic=True)
    decoded = read_batches.prefetch(2).unbatch().map(
        lambda one: tf.shape(tf.image.decode_jpeg(one, channels=3, dct_method="INTEGER_ACCURATE")),
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return decoded.batch(batch_size).prefetch(4).as_numpy_iterator()


def hugging_face(split, palette_VC: np.ndarray, batch_size: int) -> Iterator:
    """ImageGPTImageProcessor with the same palette on the same images, without resizing."""
    from transformers import ImageGPTImageProcessor

    processor = ImageGPTImageProcessor(clusters=palette_VC, do_resize=False)
    images = list(split.read(np.arange(batch_size)))
    while True:
        yield processor(images)["input_ids"]


def rows(folder: str, store: str) -> dict[str, tuple[Callable[[], tuple[float, float]], str]]:
    """Rows by name: how to measure each, and the row that is its limit."""
    if not store:
        store = f"{folder}/store"
        prepare.run(PrepareConfig(source="synthetic:20000", image_size=32), store)
    opened = data.open_data(DataConfig(store=store))
    split, codec = opened.split("train"), Palette(opened.palette)
    Pictures(data_dir=folder, file_format="array_record").download_and_prepare()
    records = data.open_data(DataConfig(store=f"tfds:{folder}/pictures/1.0.0"), 32).split("train+held_out")
    sharding = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))

    def streamed(given, augment: str, batch_size: int) -> tuple[float, float]:
        return rate(pipeline.batches(given, codec, seed=0, batch_size=batch_size, start_step=0,
                                     rows=slice(0, batch_size), prefetch=4, augment=augment), batch_size)

    def resident(augment: str) -> tuple[float, float]:
        batches = data.train_batches(split, codec, reader="resident", seed=0, batch_size=128, start_step=0,
                                     sharding=sharding, prefetch=4, augment=augment)
        on_device = iter(lambda: next(batches).tokens.block_until_ready(), None)
        return rate(on_device, 128)

    size = split.image_size
    found = {f"store {size}x{size}, tf.data, batches of {batch_size}, {augment}":
             (lambda augment=augment, batch_size=batch_size: streamed(split, augment, batch_size), "")
             for batch_size in (128, 512) for augment in ("none", "cifar")}
    found |= {f"store {size}x{size}, resident, batches of 128, {augment}":
                  (lambda augment=augment: resident(augment), "")
              for augment in ("none", "cifar")}
    found["JPEG, tf.image decode alone"] = (lambda: rate(bare_decode(records, 64), 64), "")
    found["JPEG, read by index and tf.image decode"] = (lambda: rate(read_and_decode(records, 64), 64),
                                                        "JPEG, tf.image decode alone")
    found["JPEG, decode + random crop + area to 32x32 + quantize"] = (lambda: streamed(records, "imagenet", 64),
                                                                      "JPEG, tf.image decode alone")
    try:
        import transformers  # noqa: F401
        found["Hugging Face ImageGPTImageProcessor, batches of 32"] = (
            lambda: rate(hugging_face(split, opened.palette, 32), 32), "")
    except ImportError:
        print("transformers is not installed, so its row is missing", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="", help="a pixel store")
    parser.add_argument("--output", default="", help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = rows(folder, options.store)
        rates = {name: [] for name in table}
        for _ in range(ROUNDS):
            for name, (measure, _) in table.items():
                rates[name].append(measure())
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}, tensorflow {tf.__version__}")
    print(f"{'':64} {'images/s':>10} {'CPU us/image':>13}")
    for name, (_, limit) in table.items():
        speed, cpu = (statistics.median(values) for values in zip(*rates[name], strict=True))
        # Compare rows within each round: other load on the machine changes from round to round.
        share = limit and statistics.median(mine[0] / other[0] for mine, other in
                                            zip(rates[name], rates[limit], strict=True))
        print(f"{name:64} {speed:10,.0f} {cpu * 1e6:13,.1f}" + (f"  {share:.0%} of {limit}" if limit else ""))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({name: [{"images_per_second": speed, "cpu_seconds_per_image": cpu} for speed, cpu in values]
                       for name, values in rates.items()}, file, indent=1)


if __name__ == "__main__":
    exits.run(main)
