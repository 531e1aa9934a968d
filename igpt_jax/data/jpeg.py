"""Encoded pictures, decoded, cropped and reduced by TensorFlow: ImageNet as the paper does it (Section 3.1).

Training: the shorter side is scaled to a random size in [256, 384], a random 224x224 crop is taken and reduced to the
model's size. Evaluation: the shorter side 224, one centre crop. Scaling, crop and reduction are one here: the crop is
a square window of the picture's own pixels (its corner and size rounded to whole ones), of which JPEG decodes no more
than it must, and one area resampling reduces it to the model's size.

Dimensions: Y rows, X columns, C channels.
"""

import tensorflow as tf

CROP, SHORTEST, LONGEST = 224, 256, 384  # pixels


def decode(data: tf.Tensor, draws: tf.Tensor, image_size: int, random: bool) -> tf.Tensor:
    """uint8 [image_size, image_size, 3] of an encoded picture: JPEG, or PNG.

    Args:
      data: its bytes.
      draws: float64 [3] in [0, 1); used where `random`.
      random: crop as for training; else the centre.
    """
    def of_jpeg() -> tf.Tensor:
        window = window_of(tf.io.extract_jpeg_shape(data)[:2], draws, random)
        return tf.image.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")

    def of_png() -> tf.Tensor:
        picture_YXC = tf.io.decode_png(data, channels=3)
        window = window_of(tf.shape(picture_YXC)[:2], draws, random)
        return tf.image.crop_to_bounding_box(picture_YXC, *tf.unstack(window))

    crop_YXC = tf.cond(tf.io.is_jpeg(data), of_jpeg, of_png)
    small = tf.raw_ops.ResizeArea(images=crop_YXC[None], size=[image_size, image_size])[0]
    return tf.ensure_shape(tf.cast(tf.round(small), tf.uint8), [image_size, image_size, 3])


def window_of(shape: tf.Tensor, draws: tf.Tensor, random: bool) -> tf.Tensor:
    """Top, left, height and width of the square window, int32 [4], of a picture of `shape` [height, width]."""
    shape = tf.cast(shape, tf.float64)
    shorter = tf.reduce_min(shape)
    if not random:
        corner = tf.floor((shape - shorter) / 2)
        return tf.cast(tf.concat([corner, [shorter, shorter]], 0), tf.int32)
    scaled = SHORTEST + tf.floor(draws[0] * (LONGEST - SHORTEST + 1))
    side = tf.maximum(tf.round(CROP * shorter / scaled), 1)
    corner = tf.floor(draws[1:3] * (shape - side + 1))
    return tf.cast(tf.concat([corner, [side, side]], 0), tf.int32)
