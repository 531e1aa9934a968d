"""Large sets: tf.data reads batches from the pixel store, quantizes them and keeps some ready.

tf.data decides nothing here: which images a step reads comes from `order`, so the pipeline has no state to save and
starts at any step. TensorFlow is imported on the CPU only; accelerators are JAX's.

Dimensions: B batch of all processes, R its rows that this process reads, T tokens; Y rows, X columns, C channels.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from igpt_jax.data import order
from igpt_jax.data.store import Split

for kind in ("GPU", "TPU"):
    with contextlib.suppress(RuntimeError):  # the caller has started TensorFlow, with the devices that it wants
        tf.config.set_visible_devices([], kind)


def batches(split: Split, table: np.ndarray, *, seed: int, batch_size: int, start_step: int, rows: slice,
            prefetch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and tokens int32 [R, T] of its `rows`.

    Args:
      rows: of the global batch, those that this process needs.
      prefetch: batches read ahead.

    Raises:
      UserError: an image is damaged or missing on disk.
    """
    failures: list[Exception] = []

    def read(step: np.int64) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids_B = order.batch(seed, int(step), batch_size, split.count)
            return ids_B, split.read(ids_B[rows])
        except Exception as error:  # TensorFlow keeps only its text
            failures.append(error)
            raise

    def quantize(ids_B: tf.Tensor, images_RYXC: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        red, green, blue = tf.unstack(tf.cast(tf.ensure_shape(images_RYXC, [None, None, None, 3]), tf.int32), axis=-1)
        index_RT = tf.reshape(red * 2**16 + green * 2**8 + blue, [rows.stop - rows.start, split.image_size**2])
        return ids_B, tf.cast(tf.gather(table_on_cpu, index_RT), tf.int32)

    with tf.device("cpu"):
        table_on_cpu = tf.constant(table)
        dataset = tf.data.Dataset.range(start_step, tf.int64.max)
        dataset = dataset.map(lambda step: tf.numpy_function(read, [step], (tf.int64, tf.uint8)),
                              num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        dataset = dataset.map(quantize, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        iterator = dataset.prefetch(prefetch).as_numpy_iterator()
    try:
        yield from iterator
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        del iterator, dataset  # ends tf.data's threads
