"""Writes small data sets of TFDS for tests: python tfds_build.py FOLDER."""

import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Pictures(tfds.core.GeneratorBasedBuilder):
    """JPEGs of random sizes in three classes."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="jpeg"), "file_name": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(0, 40), "validation": self._generate_examples(40, 7)}

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            rng = np.random.default_rng(i)
            coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
            size = [int(side) for side in rng.integers(64, 160, 2)]
            picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
            yield i, {"image": picture, "file_name": f"{i}.jpg", "label": i % 3}


def encoded(image, kind, **options):
    """A picture as an open file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    data.seek(0)
    return data


rng = np.random.default_rng(0)
rgb, wide = (Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((24, 24, 3), (24, 31, 3)))
exif = Image.Exif()
exif[0x0112] = 8
clear = rgb.convert("RGBA")
clear.putalpha(Image.fromarray(rng.integers(0, 2, (24, 24), np.uint8) * 255))
jpeg, webp = (encoded(wide, kind).getvalue() for kind in ("JPEG", "WEBP"))
ODD = [encoded(rgb, "PNG"), encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True),
       encoded(wide, "JPEG", exif=exif), encoded(wide, "PNG", exif=exif), encoded(wide.convert("CMYK"), "JPEG"),
       encoded(rgb.convert("L"), "PNG", transparency=77), encoded(rgb.convert("P"), "PNG"),
       encoded(Image.fromarray(rng.integers(0, 2**16, (24, 24), np.uint16)), "PNG"),
       encoded(rgb.resize((4, 4)), "PNG"), io.BytesIO(jpeg[:len(jpeg) // 2]), io.BytesIO(webp[:len(webp) // 2])]


class Odd(tfds.core.GeneratorBasedBuilder):
    """Unlabeled pictures of unusual kinds, some of them unusable."""
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, picture in enumerate(ODD):
            yield i, {"image": picture, "label": -1}


for file_format in ("array_record", "tfrecord"):
    Pictures(data_dir=f"{sys.argv[1]}/{file_format}", file_format=file_format).download_and_prepare()
Odd(data_dir=f"{sys.argv[1]}/array_record", file_format="array_record").download_and_prepare()
