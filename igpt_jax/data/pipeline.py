"""Large sets: tf.data reads batches, crops, quantizes them and keeps some ready.

tf.data decides nothing here: which images a step reads comes from `order`, so the pipeline has no state to save and
starts at any step. TensorFlow is imported on the CPU only; accelerators are JAX's.

Dimensions: B batch of all processes, R its rows that this process reads, T tokens; Y rows, X columns, C channels.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from igpt_jax.data import augmentation, order, palette

STEPS_AT_ONCE = 16  # whose order is worked out together: NumPy's calls cost more than the numbers

for kind in ("GPU", "TPU"):
    with contextlib.suppress(RuntimeError):  # the caller has started TensorFlow, with the devices that it wants
        tf.config.set_visible_devices([], kind)


def batches(split, table: np.ndarray, *, seed: int, batch_size: int, start_step: int, rows: slice, prefetch: int,
            augment: str = "none", window: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and tokens int32 [R, T] of its `rows`.

    Args:
      split: of a pixel store, or records.RecordSplit.
      rows: of the global batch, those that this process needs.
      prefetch: batches read ahead.
      augment: of augment.AUGMENTATIONS.
      window: `order.batch`'s.

    Raises:
      UserError: an image is damaged or missing on disk.
    """
    failures: list[Exception] = []

    @functools.lru_cache(maxsize=4)
    def ids_of(group: int) -> np.ndarray:
        """The ids of STEPS_AT_ONCE steps, [STEPS_AT_ONCE, B]: batches are cut from one sequence, in any size."""
        ids = order.batch(seed, group, STEPS_AT_ONCE * batch_size, split.components, window)
        return ids.reshape(STEPS_AT_ONCE, batch_size)

    def ids_at(step: int) -> np.ndarray:
        group, place = divmod(step, STEPS_AT_ONCE)
        return ids_of(group)[place]

    def read(step: np.int64) -> np.ndarray:
        try:
            return tokens_at(int(step)).astype(np.int32)
        except Exception as error:  # TensorFlow keeps only its text
            failures.append(error)
            raise

    def tokens_at(step: int) -> np.ndarray:
        """Tokens uint16 [R, T] of this process's rows; crops depend on their positions in the run's sequence."""
        ids_R, position_R = ids_at(step)[rows], step * batch_size + np.arange(rows.start, rows.stop)
        crops = (augmentation.unit_draws(seed, position_R, 3),) if augment == "imagenet" else ()
        tokens_RT = palette.encode(split.read(ids_R, *crops), table)
        if augment == "cifar":
            tokens_RT = augmentation.moved(tokens_RT, *augmentation.crop_and_mirror(seed, position_R, split.image_size))
        return tokens_RT

    with tf.device("cpu"):
        dataset = tf.data.Dataset.range(start_step, tf.int64.max)
        # NumPy's look-up needs a third of the time of TensorFlow's gather, and lets go of Python's lock.
        dataset = dataset.map(lambda step: tf.numpy_function(read, [step], tf.int32),
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
