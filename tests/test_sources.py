"""Folders, tar shards and archives: their images, in slices and from the middle, and their errors."""

import io
import os
import re
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from igpt_jax.config import PrepareConfig, UserError
from igpt_jax.data import images, sources
from igpt_jax.data.sources import tfds
from igpt_jax.jobs import prepare


def png(value, size=8):
    data = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def rows_of(text, start=0, shard=(0, 1)):
    """(name, label, red) of each image; for an image in quarantine, the reason in place of red."""
    found = []
    for name, label, content in sources.open_source(text, 8, 0, shard).items(start):
        try:
            data = content() if callable(content) else content
            found.append((name, label, int(images.decode(data, 8)[0, 0, 0])))
        except images.Unusable as reason:
            found.append((name, label, str(reason)))
    return found


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name, data in {"owl/b.PNG": png(3), "cat/z.png": png(2), "cat/deep/er/a.jpeg": png(1), "cat/notes.txt": b"x",
                       "cat/clip.gif": b"x", ".hidden/a.png": png(9), "cat/.DS_Store": b"x", "__MACOSX/a.png": png(9),
                       "empty/thumbs.db": b"x"}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def test_folder(folder):
    """A PNG named .jpeg is decoded by its content. Seen to fail with labels from the deepest folder."""
    assert rows_of(f"folder:{folder}") == [("cat/deep/er/a.jpeg", 0, 1), ("cat/z.png", 0, 2), ("owl/b.PNG", 1, 3)]
    source = sources.open_source(f"folder:{folder}", 8, 0)
    assert source.class_names == ("cat", "owl") and source.skipped == {".db": 1, ".gif": 1, ".txt": 1}
    assert rows_of(f"folder:{folder / 'owl'}") == [("b.PNG", None, 3)]


@pytest.mark.parametrize("text, fix", [("pictures/train", "Write folder:pictures/train"), ("a/*.npz", "npz:a/*.npz"),
                                       ("x/{0..9}.tar", "tar:x/{0..9}.tar"), ("folders:x", "Did you mean 'folder'?")])
def test_a_path_without_its_kind(text, fix):
    with pytest.raises(UserError, match=re.escape(fix)):
        sources.open_source(text, 8, 0)


def test_links_are_followed_once(folder, tmp_path):
    """Seen to fail (in an endless loop) without the set of folders seen."""
    (folder / "owl" / "loop").symlink_to(folder)
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(png(7))
    (folder / "owl" / "nowhere.png").symlink_to(tmp_path / "nothing")
    rows = sources.open_source(f"folder:{folder}", 8, 0).items(0)
    assert [(row.name, row.label) for row in rows] == [
        ("cat/deep/er/a.jpeg", 0), ("cat/z.png", 0), ("dog/d.png", 1), ("owl/b.PNG", 2), ("owl/nowhere.png", 2)]


def test_unusable_folders(folder, tmp_path):
    (folder / "lone.png").write_bytes(png(5))
    for text, message in ((f"folder:{folder}", "both in class folders"), ("folder", "needs a path"),
                          (f"folder:{folder}/nowhere", "not a folder"), (f"folder:{folder}/empty", "no images")):
        with pytest.raises(UserError, match=message):
            sources.open_source(text, 8, 0)
    with pytest.raises(UserError, match="Set image_size"):
        sources.open_source(f"folder:{folder}/owl", 0, 0)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = getattr(tarfile, content), "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "web-0.tar", [("a/1.png", png(1)), ("a/1.cls", b"4"), ("a/1.txt", b"a caption"),
                                       ("2.json", b'{"label": 5}'), ("2.jpg", png(2))])
    write_tar(tmp_path / "web-1.tar", [("3.cls", b"6\n"), ("3.webp", png(3))])
    return f"tar:{tmp_path}/web-*.tar"


def test_tar(shards):
    """Keys, labels of both kinds, whole files to a slice. Seen to fail with the offset of the header for the data."""
    rows = [("web-0.tar:a/1.png", 4, 1), ("web-0.tar:2.jpg", 5, 2), ("web-1.tar:3.webp", 6, 3)]
    assert rows_of(shards) == rows
    assert rows_of(shards, start=1) == rows[1:]
    assert rows_of(shards, shard=(0, 2)) == rows[:2] and rows_of(shards, shard=(1, 2)) == rows[2:]
    assert sources.open_source(shards, 8, 0).skipped == {".txt": 1}


def test_tar_with_some_labels(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("2.png", png(2)), ("2.cls", b"0")])
    with pytest.raises(UserError, match="1.png has no .cls or .json"):
        sources.open_source(f"tar:{tmp_path}/a.tar", 8, 0)


@pytest.mark.parametrize(("labels", "wanted"), [
    ([b'{"caption": "a dog", "status": "success"}', b"[1]"], [None, None]),  # as img2dataset writes them
    ([b'{"label": null}', b'{"label": "word", "cls": null}'], [None, "no class number"]),
    ([b'{"label": "3"}', b'{"label": null, "cls": 4.0}', b'{"label": 007}', b"{}"],
     [3, 4, "no class number", "has no class, and others have"]),
    ([b"{}"] * 16 + [b'{"label": 3}'], [None] * 16 + ["has a class, and others have none"]),
])
def test_tar_labels_in_json(tmp_path, labels, wanted):
    """Seen to fail: without a label (all refused), and "3"."""
    write_tar(tmp_path / "a.tar", [member for i, text in enumerate(labels) for member in (
        (f"{i:02}.jpg", png(1)), (f"{i:02}.json", text), (f"{i:02}.txt", b"a caption"))])
    for (_, label, value), expected in zip(rows_of(f"tar:{tmp_path}/a.tar"), wanted, strict=True):
        assert expected in value if isinstance(expected, str) else (label, value) == (expected, 1)


def test_tar_labels_in_cls(tmp_path):
    """Upper case too. Seen to fail with JSON's numbers (007)."""
    write_tar(tmp_path / "a.tar", [("1.JPG", png(1)), ("1.CLS", b"007"), ("README", b""), ("2.png", png(2)),
                                   ("2.cls", b"\xef\xbb\xbf1\r\n"), ("3.png", png(3)), ("3.cls", b"-1"),
                                   ("4.png", png(4)), ("4.cls", b"\xc2\xb2")])
    assert [label for _, label, _ in rows_of(f"tar:{tmp_path}/a.tar")] == [7, 1, None, None]
    assert sources.open_source(f"tar:{tmp_path}/a.tar", 8, 0).skipped == {"no ending": 1}


@pytest.mark.parametrize("name", ["tar", "npz"])
def test_a_pipe_among_the_files_is_refused(tmp_path, name):
    """Seen to fail: it blocks forever."""
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="x is not a regular file"):
        sources.open_source(f"{name}:{tmp_path}/*", 8, 0)


def test_other_than_regular_files_go_to_quarantine(folder):
    """A pipe, a device and a folder with a picture's name. Seen to fail (the pipe blocks forever) with read_bytes."""
    os.mkfifo(folder / "cat" / "pipe.jpg")
    (folder / "cat" / "device.png").symlink_to("/dev/zero")
    (folder / "cat" / "x.jpg").mkdir()
    rows = {name: value for name, _, value in rows_of(f"folder:{folder}")}
    assert rows.pop("cat/pipe.jpg") == rows.pop("cat/device.png") == "not a regular file" and len(rows) == 3


def test_a_source_without_one_good_picture(tmp_path):
    """Seen to fail with "split 'train' is not in ..."."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    config = PrepareConfig(source=f"folder:{tmp_path}", image_size=8, max_quarantined=1.0)
    with pytest.raises(UserError, match="none of the 2 train images can be used; the first: a.png: not a JPEG"):
        prepare.run(config, str(tmp_path / ".work"))


def test_tar_that_reaches_out(tmp_path):
    """Nothing is written, and every member is reported. Seen to fail (a picture) without _problem."""
    write_tar(tmp_path / "bad.tar", [("../up.png", png(1)), ("/abs.png", png(2)), ("sym.png", "SYMTYPE"),
                                     ("hard.png", "LNKTYPE"), ("device.png", "CHRTYPE"),
                                     ("fifo.png", "FIFOTYPE"), ("good.png", png(9)), ("good.cls", b"1"),
                                     ("lone.cls", b"1"), ("word.png", png(3)), ("word.cls", b"cat"),
                                     ("good.jpg", png(8))])
    rows = {name.partition(":")[2]: value for name, _, value in rows_of(f"tar:{tmp_path}/bad.tar")}
    assert rows.pop("good.png") == 9
    assert rows == {"../up.png": "its path leads out of the archive", "/abs.png": "its path leads out of the archive",
                    "sym.png": "a link", "hard.png": "a link", "device.png": "not a regular file",
                    "fifo.png": "not a regular file", "lone": "a label without a picture",
                    "word.png": "its .cls has no class number from 0 to 2^31 - 1",
                    "good.jpg": "a second picture of one key"}
    assert {file.name for file in tmp_path.iterdir()} == {"bad.tar"}


@pytest.mark.parametrize(("damage", "message"), [("cut", "not a readable"), ("header", "damaged header at byte"),
                                                 ("gzip", "gunzip"), ("empty", "no pictures|not a readable")])
def test_damaged_tar(tmp_path, damage, message):
    """Seen to fail (header: one picture of three, silently) without the check of the bytes after the last member."""
    file = tmp_path / "a.tar"
    write_tar(file, [(f"{i}.png", png(i, 64)) for i in range(3)])
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:1300]
    elif damage == "header":
        data[1024 + 20] ^= 1  # after the first member's header and its one block of data
    elif damage == "gzip":
        import gzip
        data = gzip.compress(bytes(data))
    else:
        data = b""
    file.write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        sources.open_source(f"tar:{file}", 8, 0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("megabytes", "at_once"), [(1, [64, 36]), (16000, [1] * 100), (0, [64, 36])])
def test_tfds_reads_fewer_large_examples_at_once(monkeypatch, megabytes, at_once):
    """Of 100 examples. Seen to fail with 64 of any size (10 GB)."""
    split = types.SimpleNamespace(name="train", num_examples=100, num_bytes=megabytes * 2**20, shard_lengths=[100])
    info = types.SimpleNamespace(splits={"train": split}, full_name="x", file_format=types.SimpleNamespace(
        value="array_record"))
    asked = []
    data = types.SimpleNamespace(__getitems__=lambda ids: asked.append(len(ids)) or [{"image": b""}] * len(ids))
    builder = types.SimpleNamespace(info=info, as_data_source=lambda **options: data)
    decode = types.SimpleNamespace(SkipDecoding=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(decode=decode))
    monkeypatch.setattr(tfds, "open_builder", lambda argument: (builder, "train"))
    monkeypatch.setattr(tfds, "keys_of", lambda builder: ("image", None))
    assert len(list(tfds.Tfds("x", 8, 0, (0, 1)).items(0))) == 100
    assert asked == at_once


@pytest.mark.parametrize("text", ["digits", "synthetic:2500"])
def test_slices_and_starts(text):
    """The slices together are the whole source, and a start in the middle gives the rest. Seen to fail with
    a slice's last image left out."""
    def rows(start=0, shard=(0, 1)):
        return [(item.name, item.label, item.content.tobytes())
                for item in sources.open_source(text, 8, 0, shard).items(start)]

    whole = rows()
    assert sum((rows(shard=(i, 3)) for i in range(3)), []) == whole
    assert rows(start=1100) == whole[1100:]


def test_npz_is_read_from_the_middle(tmp_path):
    """Across files. Seen to fail with the second file's images counted from the first's."""
    values = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    for name, some_rows in (("a", slice(0, 13)), ("b", slice(13, 30))):
        np.savez(tmp_path / f"{name}.npz", images=values[some_rows], labels=np.arange(30)[some_rows])
    source = sources.open_source(f"npz:{tmp_path}/?.npz", 8, 0, (1, 2))
    items = list(source.items(3))
    assert [item.label for item in items] == list(range(18, 30)) and items[0].name == "b.npz[5]"
    np.testing.assert_array_equal([item.content for item in items], values[18:])
