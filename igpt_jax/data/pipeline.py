"""Large sets: tf.data reads batches, crops, quantizes them and keeps some ready.

tf.data decides nothing here: which images a step reads comes from `order`, so the pipeline has no state to save and
starts at any step. TensorFlow is imported on the CPU only; accelerators are JAX's.

Dimensions: B batch of all processes, R its rows that this process reads, T tokens; Y rows, X columns, C channels.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from igpt_jax.data import augment, jpeg, order

for kind in ("GPU", "TPU"):
    with contextlib.suppress(RuntimeError):  # the caller has started TensorFlow, with the devices that it wants
        tf.config.set_visible_devices([], kind)


def batches(split, table: np.ndarray, *, seed: int, batch_size: int, start_step: int, rows: slice, prefetch: int,
            recipe: str = "none", window: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and tokens int32 [R, T] of its `rows`.

    Args:
      split: of a pixel store, or records.RecordSplit.
      rows: of the global batch, those that this process needs.
      prefetch: batches read ahead.
      recipe: of augment.RECIPES.
      window: `order.batch`'s.

    Raises:
      UserError: an image is damaged or missing on disk.
    """
    failures: list[Exception] = []
    count, size = rows.stop - rows.start, split.image_size

    def reporting(function):
        def call(*arguments):
            try:
                return function(*arguments)
            except Exception as error:  # TensorFlow keeps only its text
                failures.append(error)
                raise
        return call

    def ids_at(step: np.int64) -> tuple[np.ndarray, np.ndarray]:
        """The batch's ids, and the places of this process's rows in the run's sequence."""
        ids_B = order.batch(seed, int(step), batch_size, split.components, window)
        return ids_B, int(step) * batch_size + np.arange(rows.start, rows.stop)

    @reporting
    def read(step: np.int64):
        ids_B, _ = ids_at(step)
        return ids_B, split.read(ids_B[rows])

    @reporting
    def read_and_place(step: np.int64):
        ids_B, position_R = ids_at(step)
        return ids_B, split.read(ids_B[rows]), *augment.crop_and_mirror(seed, position_R, size)

    @reporting
    def read_examples(step: np.int64):
        ids_B, position_R = ids_at(step)
        return ids_B, np.array(split.examples(ids_B[rows]), object), augment.unit_draws(seed, position_R, 3)

    def quantized(images_RYXC: tf.Tensor) -> tf.Tensor:
        red, green, blue = tf.unstack(tf.cast(tf.ensure_shape(images_RYXC, [None, None, None, 3]), tf.int32), axis=-1)
        return tf.gather(table_on_cpu, red * 2**16 + green * 2**8 + blue)

    def tokens(ids_B: tf.Tensor, images_RYXC: tf.Tensor, rows_RY=None, columns_RX=None):
        tokens_RYX = quantized(images_RYXC)
        if rows_RY is not None:
            tokens_RYX = tf.gather(tokens_RYX, tf.ensure_shape(rows_RY, [count, size]), batch_dims=1)
            flat = tf.reshape(tokens_RYX, [count, size, size])
            columns = tf.ensure_shape(columns_RX, [count, size])
            tokens_RYX = tf.transpose(tf.gather(tf.transpose(flat, [0, 2, 1]), columns, batch_dims=1), [0, 2, 1])
        return ids_B, tf.cast(tf.reshape(tokens_RYX, [count, size**2]), tf.int32)

    with tf.device("cpu"):
        table_on_cpu = tf.constant(table)
        dataset = tf.data.Dataset.range(start_step, tf.int64.max)
        if recipe == "imagenet":
            dataset = _pictures(dataset, read_examples, split, size, count)
        else:
            function, types = (read, (tf.int64, tf.uint8)) if recipe == "none" else (
                read_and_place, (tf.int64, tf.uint8, tf.int32, tf.int32))
            dataset = dataset.map(lambda step: tf.numpy_function(function, [step], types),
                                  num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        dataset = dataset.map(tokens, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        iterator = dataset.prefetch(prefetch).as_numpy_iterator()
    try:
        yield from iterator
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        del iterator, dataset  # ends tf.data's threads


def _pictures(steps: tf.data.Dataset, read_examples, split, size: int, count: int) -> tf.data.Dataset:
    """(ids [B], images uint8 [R, Y, X, 3]) of each step: examples are read by the batch, decoded one by one."""
    def load(step: tf.Tensor):
        ids_B, examples_R, draws_R3 = tf.numpy_function(read_examples, [step], (tf.int64, tf.string, tf.float64))
        pictures_R = tf.ensure_shape(split.pictures(examples_R), [count])
        return tf.repeat(ids_B[None], count, axis=0), pictures_R, tf.ensure_shape(draws_R3, [count, 3])

    def decode(ids_B, picture, draws):
        return ids_B, jpeg.decode(picture, draws, size, random=True)

    dataset = steps.map(load, num_parallel_calls=2, deterministic=True).prefetch(2).unbatch()
    dataset = dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset.batch(count).map(lambda ids_RB, images_RYXC: (ids_RB[0], images_RYXC))
