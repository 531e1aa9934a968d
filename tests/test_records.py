"""Data sets of TFDS, which the real library writes here: read by index for training, and as a source of prepare.

In a process of its own: TFDS and what it imports warn where pytest makes errors of warnings.
"""

import pytest

BUILD = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Pictures(tfds.core.GeneratorBasedBuilder):
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
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run([sys.executable, "-c", BUILD, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_random_crops_by_index(folder, python):
    """Against Pillow: windows of the stated sizes, reduced by their mean; every window is drawn by (seed, position)
    alone, on 1, 2, 4 and 8 hosts and from the middle. Seen to fail with top and left exchanged, with SHORTEST as 200,
    and with draws by the row in the batch."""
    python(f"""
import io, numpy as np
from PIL import Image
from igpt_jax import data
from igpt_jax.config import DataConfig
from igpt_jax.data import augmentation, order, pipeline
store = data.open_data(DataConfig(store="tfds:{folder}/array_record/pictures/1.0.0"), 16)
train, held_out, validation = (store.split(name) for name in ("train", "held_out", "validation"))
assert (train.count, held_out.count, validation.count, store.classes) == (36, 4, 7, 3)
both = store.split("train+held_out")
pictures = [data for _, data in both.pictures(np.arange(40))]
assert len(set(pictures)) == 40
decoded = [Image.open(io.BytesIO(one)).convert("RGB") for one in pictures]
assert both.labels(np.arange(40)).tolist().count(0) == 14

draws = augmentation.unit_draws(3, np.arange(2000), 3)
left, top, side = np.array([augmentation.window(one, 16, 140, 100) for one in draws[:500]]).T
assert side.min() == round(224 / 384 * 100) and side.max() == round(224 / 256 * 100)
assert top.min() == 0 and left.min() == 0 and (top + side).max() == 100 and (left + side).max() == 140
assert {{augmentation.window(one, 16, 20, 16)[2] for one in draws}} == {{16}}  # nothing is enlarged

table = np.arange(2**24, dtype=np.uint16)  # a token is green and blue
def tokens(start, rows):
    reading = pipeline.batches(both, table, seed=3, batch_size=8, start_step=start, rows=rows, prefetch=1,
                               augment="imagenet")
    found = [next(reading) for _ in range(3)]
    reading.close()
    return np.stack([one for _, one in found])
whole = tokens(0, slice(0, 8))
for hosts in (2, 4, 8):
    parts = [tokens(0, slice(i * 8 // hosts, (i + 1) * 8 // hosts)) for i in range(hosts)]
    assert np.array_equal(np.concatenate(parts, 1), whole)
assert np.array_equal(tokens(2, slice(0, 8))[0], whole[2])
for step in range(3):
    ids, place = order.batch(3, step, 8, both.components), augmentation.unit_draws(3, step * 8 + np.arange(8), 3)
    for row in range(8):
        left, top, side = augmentation.window(place[row], 16, *decoded[ids[row]].size)
        crop = decoded[ids[row]].crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BOX)
        wanted = np.asarray(crop).astype(int)[..., 1]
        assert np.abs((whole[step, row] >> 8).reshape(16, 16) - wanted).max() <= 1
""", devices=1)


def test_both_readers_make_the_same_pixels(folder, python):
    """Pictures of many kinds, read by index for training and by prepare's source: equal, or unusable for one reason,
    which names the picture. Seen to fail with TensorFlow's decoders in records.py, in 9 of 12."""
    python(f"""
import numpy as np
from igpt_jax import data
from igpt_jax.config import DataConfig, UserError
from igpt_jax.data import images, pipeline, sources
path = "tfds:{folder}/array_record/odd/1.0.0"
split = data.open_data(DataConfig(store=path), 16).split("train+held_out")
items = {{item.name: item.content for item in sources.open_source(path, 16, 0).items(0)}}
names = [name for name, _ in split.pictures(np.arange(12))]
assert sorted(names) == sorted(items), names
good = 0
for i, name in enumerate(names):
    try:
        wanted, reason = images.decode(items[name], 16), ""
    except images.Unusable as error:
        reason = str(error)
    try:
        assert np.array_equal(split.read(np.array([i]))[0], wanted) and not reason, name
        good += 1
    except UserError as error:
        assert reason and f": {{name}}: {{reason}}. Leave it out" in str(error), (reason, error)
        bad = name
assert good == 9, good
for read in (lambda: split.read(np.arange(12)), lambda: split.labels(np.arange(12)), lambda: next(pipeline.batches(
        split, np.zeros(2**24, np.uint16), seed=0, batch_size=12, start_step=0, rows=slice(0, 12), prefetch=1,
        augment="imagenet"))):
    try:
        read()
        raise AssertionError("nothing was refused")
    except UserError as error:
        assert "Leave it out" in str(error) or "has no labels" in str(error), error

import pathlib
for file in pathlib.Path(path[5:]).glob("*array_record*"):
    file.write_bytes(bytes(file.stat().st_size))
for read in (lambda: split.read(np.array([3])), lambda: list(sources.open_source(path, 16, 0).items(0))):
    try:
        read()
        raise AssertionError("nothing was refused")
    except UserError as error:
        assert "cannot be read (" in str(error) and "\\n" not in str(error), error
""", devices=1)


def test_prepare_and_what_is_refused(folder, tmp_path, run_job):
    """Both file formats give the same store. A data set that TFDS does not know, or has in TFRecord files where an
    index is needed, is refused in one line."""
    stores = []
    for file_format in ("array_record", "tfrecord"):
        source = f"tfds:{folder}/{file_format}/pictures/1.0.0"
        done = run_job("prepare", f"--workdir={tmp_path}/{file_format}", f"--config.source={source}",
                       f"--config.test_source={source}@validation", "--config.image_size=16",
                       "--config.palette=fit:8")
        assert done.returncode == 0, done.stderr
        stores.append((tmp_path / file_format / "train" / "images" / "c" / "0" / "0" / "0" / "0").read_bytes())
    assert len(stores[0]) > 36 * 768 and len(stores[0]) == len(stores[1])
    for keys, message in ((["--config.source=tfds:no_such_set_here"], "cannot be opened or prepared"),
                          ([f"--config.source=tfds:{folder}/tfrecord/pictures/1.0.0@tset"], "no split 'tset'")):
        done = run_job("prepare", f"--workdir={tmp_path}/bad", "--config.image_size=16", *keys)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    done = run_job("pretrain", f"--workdir={tmp_path}/run", "--config.image_size=16",
                   f"--config.data.store=tfds:{folder}/tfrecord/pictures/1.0.0")
    assert done.returncode == 2 and "cannot be read by index" in done.stderr.splitlines()[-1], done.stderr
