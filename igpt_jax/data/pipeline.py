"""The tf.data reader for large splits: reads, crops and quantizes batches ahead of the training step.

`order` decides which images a step reads, so the pipeline has no state to save and can start at any step. TensorFlow
uses the CPU only and leaves accelerators to JAX.

Dimensions: B global batch, R its rows that this process reads, T tokens.
"""

import atexit
import contextlib
import functools
import weakref
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from igpt_jax.data import augmentation, order
from igpt_jax.data.codecs import Codec

STEPS_AT_ONCE = 16  # whose ids are computed together, because the calls of NumPy cost more than the arithmetic

for kind in ("GPU", "TPU"):
    with contextlib.suppress(RuntimeError):  # the caller has already started TensorFlow with its own choice of devices
        tf.config.set_visible_devices([], kind)


_open: weakref.WeakSet[Iterator] = weakref.WeakSet()  # what `batches` has returned


@atexit.register
def _close_all() -> None:
    """Ends tf.data's threads before Python stops those that want its lock: TensorFlow would wait for them for ever.

    An exception that ends the process holds the frames, and so the generators, of its traceback.
    """
    for generator in list(_open):
        generator.close()


def batches(split, codec: Codec, *, seed: int, batch_size: int, start_step: int, rows: slice, prefetch: int,
            augment: str = "none", window: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each step from start_step, the global batch's ids int64 [B] and tokens int32 [R, T] of its `rows`.

    Args:
      split: of a pixel store, or records.RecordSplit.
      rows: of the global batch, those that this process's devices hold.
      prefetch: batches read ahead.
      augment: value of the key data.augment.
      window: as of `order.batch`.

    Raises:
      UserError: an image is damaged or missing on disk.
    """
    failures: list[Exception] = []

    @functools.lru_cache(maxsize=4)
    def ids_of(group: int) -> np.ndarray:
        """The ids of STEPS_AT_ONCE steps, [STEPS_AT_ONCE, B].

        They are those of one large batch, because batches of any size are cut from the same sequence.
        """
        ids = order.batch(seed, group, STEPS_AT_ONCE * batch_size, split.components, window)
        return ids.reshape(STEPS_AT_ONCE, batch_size)

    def ids_at(step: int) -> np.ndarray:
        group, row = divmod(step, STEPS_AT_ONCE)
        return ids_of(group)[row]

    def read(step: np.int64) -> np.ndarray:
        try:
            return tokens_at(int(step)).astype(np.int32)
        except Exception as error:  # TensorFlow passes on only its text; the caller needs the exception
            failures.append(error)
            raise

    def tokens_at(step: int) -> np.ndarray:
        """Tokens [R, T] of this process's rows. Crops depend on the rows' positions in the run's sequence."""
        ids_R, position_R = ids_at(step)[rows], step * batch_size + np.arange(rows.start, rows.stop)
        crops = (augmentation.unit_draws(seed, position_R, 3),) if augment == "imagenet" else ()
        tokens_RT = codec.encode(split.read(ids_R, *crops))
        return augmentation.augmented(augment, tokens_RT, seed, position_R, codec)

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with tf.device("cpu"):
            dataset = tf.data.Dataset.range(start_step, tf.int64.max)
            # NumPy's lookup takes a third of the time of TensorFlow's gather, and releases Python's lock. There is no
            # Python code to convert to TensorFlow, which would leave a file in /tmp where a process is killed.
            call = tf.autograph.experimental.do_not_convert(lambda step: tf.numpy_function(read, [step], tf.int32))
            dataset = dataset.map(call, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            iterator = dataset.prefetch(prefetch).as_numpy_iterator()
        try:
            for step, tokens_RT in enumerate(iterator, start_step):
                yield ids_at(step), tokens_RT
        except Exception:
            if not failures:
                raise
        finally:
            del iterator, dataset  # tf.data's threads end with them
        raise failures[0]  # alone: the traceback of TensorFlow's error holds the iterator

    reading = generate()
    _open.add(reading)
    return reading
