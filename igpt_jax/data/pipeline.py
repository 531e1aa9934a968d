"""Large sets: tf.data reads batches, crops, quantizes them and keeps some ready.

tf.data decides nothing here: which images a step reads comes from `order`, so the pipeline has no state to save and
starts at any step. TensorFlow is imported on the CPU only; accelerators are JAX's.

Dimensions: B batch of all processes, R its rows that this process reads, T tokens; Y rows, X columns, C channels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from igpt_jax import palette
from igpt_jax.data import augment, jpeg, order

STEPS_AT_ONCE = 16  # whose order is worked out together: NumPy's calls cost more than the numbers

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

    def reporting(function: Callable) -> Callable:
        def call(*arguments):
            try:
                return function(*arguments)
            except Exception as error:  # TensorFlow keeps only its text
                failures.append(error)
                raise
        return call

    @functools.lru_cache(maxsize=4)
    def ids_of(group: int) -> np.ndarray:
        """The ids of STEPS_AT_ONCE steps, [STEPS_AT_ONCE, B]: batches are cut from one sequence, in any size."""
        ids = order.batch(seed, group, STEPS_AT_ONCE * batch_size, split.components, window)
        return ids.reshape(STEPS_AT_ONCE, batch_size)

    def ids_at(step: int) -> np.ndarray:
        group, place = divmod(step, STEPS_AT_ONCE)
        return ids_of(group)[place]

    def rows_at(step: np.int64) -> tuple[np.ndarray, np.ndarray]:
        """The ids of this process's rows, and their places in the run's sequence."""
        return ids_at(int(step))[rows], int(step) * batch_size + np.arange(rows.start, rows.stop)

    @reporting
    def read(step: np.int64) -> np.ndarray:
        ids_R, position_R = rows_at(step)
        tokens_RT = palette.encode(split.read(ids_R), table)
        if recipe == "cifar":
            tokens_RT = augment.moved(tokens_RT, *augment.crop_and_mirror(seed, position_R, size))
        return tokens_RT.astype(np.int32)

    @reporting
    def read_examples(step: np.int64) -> tuple[np.ndarray, np.ndarray]:
        ids_R, position_R = rows_at(step)
        return np.array(split.examples(ids_R), object), augment.unit_draws(seed, position_R, 3)

    def quantize(images_RYXC: np.ndarray) -> np.ndarray:
        return palette.encode(images_RYXC, table).astype(np.int32)

    with tf.device("cpu"):
        dataset = tf.data.Dataset.range(start_step, tf.int64.max)
        if recipe == "imagenet":
            dataset = _pictures(dataset, read_examples, split, size, count)
        # NumPy's look-up needs a third of the time of TensorFlow's gather, and lets go of Python's lock.
        function = quantize if recipe == "imagenet" else read
        dataset = dataset.map(lambda given: tf.numpy_function(function, [given], tf.int32),
                              num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        iterator = dataset.prefetch(prefetch).as_numpy_iterator()
    try:
        for step, tokens_RT in enumerate(iterator, start_step):
            yield ids_at(step), tokens_RT
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        del iterator, dataset  # ends tf.data's threads


def _pictures(steps: tf.data.Dataset, read_examples: Callable, split, size: int, count: int) -> tf.data.Dataset:
    """Images uint8 [R, Y, X, 3] of each step: examples are read by the batch, decoded one by one."""
    def load(step: tf.Tensor):
        examples_R, draws_R3 = tf.numpy_function(read_examples, [step], (tf.string, tf.float64))
        return tf.ensure_shape(split.pictures(examples_R), [count]), tf.ensure_shape(draws_R3, [count, 3])

    def decode(picture, draws):
        return jpeg.decode(picture, draws, size, random=True)

    dataset = steps.map(load, num_parallel_calls=2, deterministic=True).prefetch(2).unbatch()
    return dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(count)
