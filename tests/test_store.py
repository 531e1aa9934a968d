"""The pixel store: reading, writing, errors, and detection of all damage."""

import hashlib
import json
import pathlib
import threading
import types

import numpy as np
import pytest
import tensorstore
from conftest import patience

from igpt_jax import data, storage
from igpt_jax.config import DataConfig, PrepareConfig, UserError, base_config, parse
from igpt_jax.data import order, palette, staging, store
from igpt_jax.data.codecs import Palette
from igpt_jax.data.store import reader, writer
from igpt_jax.data.token_file import tokens_of
from igpt_jax.jobs import prepare
from igpt_jax.training.inputs import open_inputs

PALETTE_VC = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
FIELDS = {"source": "test", "resize": "none", "seed": 0, "held_out": {}, "config": {}}


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def write(path, splits):
    """A store of {split: (images, labels)} with 8x8 images."""
    writer = store.Writer(storage.path(path), 8)
    for split, (images, labels) in splits.items():
        for start in range(0, max(1, len(images)), 7):
            some_rows = slice(start, start + 7)
            writer.add(split, images[some_rows], None if labels is None else labels[some_rows])
    return writer.finish(PALETTE_VC, **FIELDS)


@pytest.fixture
def images():
    images = random_images(50)
    images[3] = 0  # a black image, which is not a missing one
    return images


@pytest.fixture
def path(tmp_path, images):
    write(tmp_path, {"train": (images[:30], np.arange(30)), "held_out": (images[30:], np.arange(30, 50)),
                     "test": (images[:0], np.arange(0))})
    return tmp_path


def test_what_is_written_comes_back(path, images):
    """Seen to fail where chunks of zeros are not stored, and without subtracting the split's start from the ids."""
    opened = store.Store.open(path)
    train, both = opened.split("train"), opened.split("train+held_out")
    ids = np.array([29, 3, 3, 0, 17])
    np.testing.assert_array_equal(train.read(ids), images[ids])
    ids = np.array([49, 3, 30, 29, 31])
    np.testing.assert_array_equal(both.read(ids), images[ids])
    np.testing.assert_array_equal(both.labels(ids), ids)
    assert (train.count, both.count, both.image_size, opened.classes) == (30, 50, 8, 50)
    np.testing.assert_array_equal(opened.palette, PALETTE_VC)
    codec = Palette(PALETTE_VC)
    np.testing.assert_array_equal(tokens_of(both, codec, ids), codec.encode(images[ids]))
    with pytest.raises(IndexError):
        train.read(np.array([30]))


def test_shards_are_written_as_they_fill(tmp_path, images, monkeypatch):
    """Three shards of 20, 20 and 10 images. Seen to fail with an image lost between shards."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 20 * 192)
    monkeypatch.setattr(writer, "LABELS_PER_CHUNK", 16)
    write(tmp_path, {"train": (images, np.arange(50))})
    assert len(list((tmp_path / "train" / "images" / "c").iterdir())) == 3
    split = store.Store.open(tmp_path).split("train")
    np.testing.assert_array_equal(split.read(np.arange(50)), images)
    np.testing.assert_array_equal(split.labels(np.arange(50)), np.arange(50))


def test_requests_are_sent_together(path, monkeypatch):
    """A bucket answers each after tens of milliseconds, and a merged store has thousands of files. Seen to fail (the
    pair breaks) with loops in manifest.py, and (waits first) with arrays opened one by one."""
    pair, events, opening = threading.Barrier(2, timeout=patience(0.2)), [], tensorstore.open
    for name, original in (("listing", storage.listing), ("read", storage.read)):
        def together(file, original=original):
            if file.name not in ("manifest.json", "palette.npy"):
                pair.wait()
            return original(file)
        monkeypatch.setattr(storage, name, together)

    def recorded(*given, **options):
        future = opening(*given, **options)
        events.append("open")
        return types.SimpleNamespace(result=lambda: (events.append("wait"), future.result())[1])

    monkeypatch.setattr(tensorstore, "open", recorded)
    both = store.Store.open(path).split("train+held_out")
    np.testing.assert_array_equal(both.labels(np.array([31, 2])), [31, 2])
    assert events == ["open", "open", "wait", "wait"]


def test_an_epoch_reads_each_chunk_once(tmp_path, monkeypatch):
    """Of merged slices that end within chunks, with a cache for one window of the order: whole chunks have the first
    ids. Stores merged without `aligned` keep their ids, and read a chunk up to twice. Seen to fail without cache_window
    (6 and 8 times), with the same cache for both (4 times), and with `aligned` ignored."""
    monkeypatch.setattr(reader, "CACHE_BYTES", 0)
    for i in range(3):
        prepare.run(PrepareConfig(source="synthetic:1000", image_size=8, chunk=16, held_out=0.0, shard=f"{i}/3"),
                    str(tmp_path / f"{i}"))
    prepare.run(PrepareConfig(shard="merge", palette="fit:4"), str(tmp_path))
    opened, rows = store.Store.open(tmp_path), []
    whole_train = {**opened.manifest["splits"]["train"], "aligned": False}
    for part in whole_train["parts"]:
        alone = store.split_of(opened.path, "train", {"train": {"count": 1, "parts": [part]}}, 8, 16)
        rows.append(alone.read(np.arange(part["count"])))
    whole = [rows_of_one[:320] for rows_of_one in rows] + [rows_of_one[320:] for rows_of_one in rows]

    def bytes_of_an_epoch(split, expected):
        np.testing.assert_array_equal(split.read(np.arange(1000)), np.concatenate(expected))
        split.cache_window(8)
        before = bytes_read()
        for step in range(50):
            split.read(order.batch(0, step, 20, split.components, 8))
        return bytes_read() - before

    # The least of three: on a busy machine TensorStore drops some chunks before they are read for the last time.
    aligned = min(bytes_of_an_epoch(opened.split("train"), whole) for _ in range(3))
    one_by_one = min(bytes_of_an_epoch(store.split_of(opened.path, "train", {"train": whole_train}, 8, 16), rows)
                     for _ in range(3))
    assert 192_000 < aligned < 1.3 * 200_000 and 192_000 < one_by_one < 2 * 200_000


def bytes_read():
    """From disk, by TensorStore."""
    (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_manifest(path, images):
    """Content, files and palette, by SHA-256. The content's is of the shards' digests: there is one shard here."""
    manifest = json.loads((path / "manifest.json").read_text())

    def sha256(data):
        return hashlib.sha256(data).hexdigest()

    rows, labels = images[:30].tobytes(), np.arange(30, dtype="<i4").tobytes()
    assert manifest["splits"]["train"] == {"count": 30, "parts": [
        {"folder": "train", "count": 30, "sha256": sha256(sha256(rows).encode()),
         "labels_sha256": sha256(sha256(labels).encode())}]}
    assert manifest["palette"] == palette.digest(PALETTE_VC)
    shard = (path / "train/images/c/0/0/0/0").read_bytes()
    assert manifest["files"]["train/images/c/0/0/0/0"] == [len(shard), sha256(shard)]


def test_fingerprint_is_of_the_content(path, tmp_path_factory, images):
    """Seen to fail with `splits` left out of IDENTITY."""
    def fingerprints(splits):
        opened = store.Store(folder := tmp_path_factory.mktemp("store"), write(folder, splits))
        return opened.fingerprint, opened.split("train").fingerprint

    splits = {"train": (images[:30], np.arange(30)), "held_out": (images[30:], np.arange(30, 50))}
    assert fingerprints(splits) == fingerprints(splits)
    changed = images[30:].copy()
    changed[5, 0, 0, 0] ^= 1
    other = fingerprints({**splits, "held_out": (changed, np.arange(30, 50))})
    assert other[0] != fingerprints(splits)[0] and other[1] == fingerprints(splits)[1]


def flip(file, offset):
    """Changes one bit of the byte at `offset`."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["pixel", "checksum", "index", "shard cut", "shard missing"])
def test_damaged_images_are_named(path, images, damage):
    """Seen to fail (pixel) without crc32c in the store's codecs, and (shard missing: black images) without
    fill_missing_data_reads."""
    shard = path / "train" / "images" / "c" / "0" / "0" / "0" / "0"
    start = shard.read_bytes().find(images[7].tobytes())
    if damage == "pixel":
        flip(shard, start + 100)
    elif damage == "checksum":
        flip(shard, start + 192)
    elif damage == "index":
        flip(shard, -20)
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    entry = {"pixel": "entry 7 .*", "checksum": "entry 7 .*", "index": "entry .*"}.get(damage, "")
    with pytest.raises(UserError, match=f"train/images.*{entry}0/0/0/0|train/images/c/0/0/0/0") as raised:
        store.Store.open(path).split("train+held_out").read(np.array([40, 2, 7]))
    assert "\n" not in str(raised.value)
    if "7" in entry:
        assert "entry 7" in str(raised.value)
        split = store.Store.open(path).split("train+held_out")
        np.testing.assert_array_equal(split.read(np.array([6, 8])), images[[6, 8]])


def test_damaged_labels_are_named(path):
    """Seen to fail without crc32c in the labels' codecs."""
    flip(path / "train" / "labels" / "c" / "0", 8)
    with pytest.raises(UserError, match="train/labels"):
        store.Store.open(path).split("train").labels(np.array([2]))


def test_another_palette_is_refused(path):
    np.save(path / "palette.npy", -PALETTE_VC)
    with pytest.raises(UserError, match="palette"):
        store.Store.open(path)


def test_folders_that_are_not_a_store(path, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for folder, message in [("", "data.store"), (empty / "nowhere", "does not exist"), (empty, "not a pixel store")]:
        with pytest.raises(UserError, match=message):
            store.Store.open(folder)
    for text in ("not JSON", "[]", '{"format": 99}', '{"format": 1}'):
        (empty / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            store.Store.open(empty)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        store.Store.open(path)


def test_missing_splits(path, images, tmp_path_factory):
    opened = store.Store.open(path)
    with pytest.raises(UserError, match="Did you mean 'train'"):
        opened.split("trian")
    with pytest.raises(UserError, match="'test' .* is empty"):
        opened.split("train+test")
    with pytest.raises(UserError, match="8 pixels"):
        data.open_split(str(path), "train", 16)
    unlabeled = tmp_path_factory.mktemp("unlabeled")
    write(unlabeled, {"train": (images, None)})
    with pytest.raises(UserError, match="no labels"):
        store.Store.open(unlabeled).split("train").labels(np.array([0]))


@pytest.mark.parametrize(("splits", "asked", "fix"), [
    (["train", "held_out"], "test", "prepare --workdir=DIR --config.test_source=SOURCE.* --config.data.test=held_out"),
    (["train"], "test", "It has train. Prepare another .* --config.test_source=SOURCE, and the other settings as "
                        "before.$"),
    (["train", "test"], "held_out", "--config.held_out=0.1, or name another split. .*--config.data.held_out="),
    ([], "train", r"quarantined.json says why"),
])
def test_the_error_of_a_missing_split_names_a_fix(tmp_path, images, splits, asked, fix):
    write(tmp_path, dict.fromkeys(splits, (images, None)))
    with pytest.raises(UserError, match=f"split '{asked}' is not in .*{fix}"):
        store.Store.open(tmp_path).split(asked)


def test_a_run_takes_its_own_palette_and_reads_the_staged_copy(path, tmp_path_factory):
    """The keys `palette` and `data.stage`. Seen to fail with the store's palette, and with the store in place."""
    here = tmp_path_factory.mktemp("here")
    palette.save(storage.path(here / "mine.npy"), PALETTE_VC[::-1] / 2)
    given = base_config("pretrain")
    given.data.update(store=str(path), stage=str(here / "stage"))
    given.palette = str(here / "mine.npy")
    inputs = open_inputs(parse("pretrain", given))
    np.testing.assert_array_equal(inputs.codec.palette_VC, PALETTE_VC[::-1] / 2)
    for file in (path / "train").rglob("*"):
        if file.is_file():
            file.unlink()
    assert inputs.split.read(np.arange(30)).shape == (30, 8, 8, 3)


def test_hidden_files_are_ignored(path, tmp_path_factory):
    """The system's hidden files may exist before or after writing, or be listed in an old manifest and be gone."""
    for name in (".DS_Store", "train/.nfs0001", "train/images/.DS_Store", "train/.snapshot/images/c"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["train/labels/._zarr.json"] = [1, "0"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    opened = store.Store.open(path)
    store.verify(path, opened.manifest)
    copy = store.Store.open(staging.stage(str(path), str(tmp_path_factory.mktemp("here"))))
    assert copy.split("train").read(np.arange(2)).shape == (2, 8, 8, 3)
    fresh = tmp_path_factory.mktemp("fresh")
    (fresh / "train" / "images").mkdir(parents=True)
    (fresh / "train" / "images" / ".DS_Store").write_text("x")
    assert not any(".DS" in name for name in write(fresh, {"train": (random_images(3), None)})["files"])


@pytest.mark.parametrize(("labels", "message"), [
    ([0, 2_000_000_000], "class 1 has no example in split 'train', whose 2 labels run from 0 to 2000000000"),
    ([5, 5], "all the same"), ([1, 2], "class 0 has no example"), ([0, 1], ""),
])
def test_a_gap_in_the_labels_fails_before_labels_are_counted(tmp_path, labels, message):
    """Seen to fail (16 GB) with numpy.bincount."""
    opened = store.Store(tmp_path, write(tmp_path, {"train": (random_images(2), np.array(labels, np.int32))}))
    if not message:
        assert data.count_classes(opened, opened.split("train")) == 2
        return
    with pytest.raises(UserError, match=message):
        data.count_classes(opened, opened.split("train"))


def test_stores_whose_classes_differ_are_not_mixed_to_learn_classes(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"]), ("c", [])):
        writer = store.Writer(storage.path(tmp_path / name), 8)
        writer.add("train", random_images(4), np.array([0, 1, 0, 1]))
        writer.finish(PALETTE_VC, class_names=classes, **FIELDS)
    for names, message in (("a,b", "class 0 is 'cat' and 'dog'"), ("a,c", "")):
        mixed = data.open_data(DataConfig(store=",".join(f"{tmp_path}/{name}" for name in names.split(","))))
        if message:
            with pytest.raises(UserError, match=message):
                data.count_classes(mixed, mixed.split("train"))
        else:
            assert data.count_classes(mixed, mixed.split("train")) == 2


def test_a_mixture_takes_of_joined_splits_those_that_a_store_has(tmp_path):
    """Seen to fail with the whole store b left out, silently."""
    for name, splits in (("a", ("train", "held_out")), ("b", ("train",))):
        writer = store.Writer(storage.path(tmp_path / name), 8)
        for split in splits:
            writer.add(split, random_images(4), np.array([0, 1, 0, 1]))
        writer.finish(PALETTE_VC, **FIELDS)
    mixed = data.open_data(DataConfig(store=f"{tmp_path}/a,{tmp_path}/b"))
    assert mixed.split("train+held_out").count == 12 and mixed.split("held_out").count == 4
    with pytest.raises(UserError, match="split 'test' is not in"):
        mixed.split("test")


def test_writing_never_deletes_what_is_not_a_store(tmp_path, images):
    """Seen to fail without the check in Writer: TensorStore empties the folder."""
    picture = tmp_path / "train" / "images" / "cat.png"
    picture.parent.mkdir(parents=True)
    picture.write_text("a picture of the user's")
    with pytest.raises(UserError, match="train/images"):
        write(tmp_path, {"train": (images, None)})
    assert picture.exists()


def test_writing_again_replaces_an_interrupted_store(tmp_path, images):
    store.Writer(storage.path(tmp_path), 8).add("train", images, np.arange(50))
    write(tmp_path, {"train": (images[:20], np.arange(20))})
    (tmp_path / "manifest.json").unlink()
    write(tmp_path, {"train": (images[20:], None)})
    np.testing.assert_array_equal(store.Store.open(tmp_path).split("train").read(np.arange(30)), images[20:])


@pytest.mark.parametrize(("damage", "message"), [
    ("extra", "train/images/c/0/0/0/1 is not in its manifest"),
    ("renamed", "train/images/c/0/0/0/0 is missing"),
    ("cut", "has 5,000 bytes, not"),
    ("metadata", "train/images/zarr.json differs from its SHA-256"),
    ("manifest", "its fingerprint differs"),
])
def test_files_are_checked_against_the_manifest(path, damage, message):
    """When the store is opened. Seen to fail without check_files, and (manifest) without fingerprint_of."""
    shard = path / "train" / "images" / "c" / "0" / "0" / "0" / "0"
    if damage == "extra":
        shard.with_name("1").write_bytes(b"x")
    elif damage == "renamed":
        shard.rename(shard.with_name("0.old"))
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:5000])
    elif damage == "metadata":
        flip(path / "train" / "images" / "zarr.json", 100)
    else:
        manifest = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=message) as raised:
        store.Store.open(path)
    assert "\n" not in str(raised.value)


def test_stage(path, tmp_path_factory):
    """A copy on this disk, made once, complete or not at all. Seen to fail without the comparison in staging._copy."""
    here = tmp_path_factory.mktemp("here")
    where = staging.stage(str(path), str(here))
    opened, original = store.Store.open(where), store.Store.open(path)
    assert opened.fingerprint == original.fingerprint
    copied, read = (which.split("train").read(np.arange(30)) for which in (opened, original))
    np.testing.assert_array_equal(copied, read)
    flip(path / "train" / "images" / "c" / "0" / "0" / "0" / "0", 50)
    assert staging.stage(str(path), str(here)) == where  # already copied
    with pytest.raises(UserError, match="train/images/c/0/0/0/0 differs from its SHA-256"):
        staging.stage(str(path), str(here / "again"))
    assert not list((here / "again").glob("*/manifest.json"))
    flip(path / "train" / "images" / "c" / "0" / "0" / "0" / "0", 50)  # as it was
    cut, kept = pathlib.Path(where, "manifest.json"), pathlib.Path(where, "train/labels/zarr.json")
    before = kept.stat().st_mtime_ns
    cut.unlink()
    assert staging.stage(str(path), str(here)) == where and cut.exists()
    assert kept.stat().st_mtime_ns == before  # an interrupted copy resumes
    for folder, message in (("gs://bucket", "folder of this machine"), (f"{path}/manifest.json", "Give a folder")):
        with pytest.raises(UserError, match=message):
            staging.stage(str(path), folder)
