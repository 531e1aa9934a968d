"""Detection of changed sources, for slices and resumed jobs; and the log lines on a folder's classes."""

import io
import json
import os
import re
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from igpt_jax.config import PrepareConfig, UserError
from igpt_jax.data import sources, store
from igpt_jax.data.sources import contents
from igpt_jax.jobs import prepare


def run(workdir, **keys):
    return prepare.run(PrepareConfig(**{"palette": "fit:2", "image_size": 4, "held_out": 0.0, **keys}), str(workdir))


def picture(file, value=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(value, value + 75).reshape(5, 5, 3).astype(np.uint8)).save(file)
    return file


def class_folders(root, names="bcd"):
    for name in names:
        for i in range(3):
            picture(root / name / f"{i}.png", i)
    return root


def write_tar(file, label=b"0"):
    with tarfile.open(file, "w") as archive:
        data = io.BytesIO()
        Image.linear_gradient("L").save(data, "PNG")
        for name, content in (("1.png", data.getvalue()), ("1.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_npz(file, labels):
    np.savez(file, images=np.arange(4 * 75, dtype=np.uint16).reshape(4, 5, 5, 3).astype(np.uint8), labels=labels)


CHANGES = {  # source, a change in the folder `root`, and the error message
    "a class is added": ("folder:{}/p", lambda root: picture(root / "p" / "a" / "0.png"), "only {} has class 'a'"),
    "a class is renamed": ("folder:{}/p", lambda root: (root / "p" / "c").rename(root / "p" / "a"),
                           "only {} has class 'c' and only {} has class 'a'"),
    "files are added": ("folder:{}/p", lambda root: [picture(root / "p" / "c" / f"x{i}.png") for i in range(6)],
                        "has 9 files and {} 15; file 7 is 'd/0.png"),
    "a file is renamed": ("folder:{}/p", lambda root: (root / "p" / "c" / "1.png").rename(root / "p" / "c" / "7.png"),
                          "file 5 is 'c/1.png"),
    "a shard is added": ("tar:{}/*.tar", lambda root: write_tar(root / "0.tar"), "file 1 is 'a.tar, "),
    "labels are fixed": ("npz:{}/*.npz", lambda root: write_npz(root / "b.npz", np.array([0, 1, 2, 1])),
                          "file 2 is 'b.npz, "),
}


@pytest.fixture(params=CHANGES)
def changing(request, tmp_path):
    """A source, a function that changes it, and a pattern of the error message."""
    class_folders(tmp_path / "p")
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar")
        write_npz(tmp_path / f"{name}.npz", np.array([0, 1, 2, 3]))
    source, change, message = CHANGES[request.param]
    return source.format(tmp_path), lambda: change(tmp_path), message.replace("{}", ".*")


def test_slices_of_a_source_that_changed(changing, tmp_path):
    """The error names the first difference. Slices without a summary merge as before. Seen to fail (merged, with
    labels of two numberings) without _check_same_contents."""
    source, change, message = changing
    merged = tmp_path / "merged"
    run(merged / "0", source=source, shard="0/2")
    change()
    run(merged / "1", source=source, shard="1/2")
    with pytest.raises(UserError, match=message) as raised:
        run(merged, shard="merge")
    assert "\n" not in str(raised.value) and "slice 0/2" in str(raised.value)
    for i in range(2):
        file = merged / str(i) / "slice.json"
        manifest = json.loads(file.read_text())
        del manifest["contents"]
        file.write_text(json.dumps(manifest))
    if "class" in message:  # older versions stored these
        with pytest.raises(UserError, match=message):
            run(merged, shard="merge")
    else:
        run(merged, shard="merge")


@pytest.mark.parametrize("damaged", [[], {"train": 5}, {"train": {"sha256": "x"}}, {"train": {"classes": 5}}])
def test_a_summary_that_was_changed(tmp_path, damaged):
    for i in range(2):
        run(tmp_path / "m" / str(i), source=f"folder:{class_folders(tmp_path / 'p')}", shard=f"{i}/2")
    file = tmp_path / "m" / "1" / "slice.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "contents": damaged}))
    with pytest.raises(UserError, match="changed after it was written"):
        run(tmp_path / "m", shard="merge")


def interrupt(monkeypatch, workdir, **keys):
    with monkeypatch.context() as patch:
        patch.setattr(prepare.ingest, "GROUP", 2)
        patch.setattr(prepare.StopSignal, "should_stop", lambda self: True)
        with pytest.raises(prepare.Preempted):
            run(workdir, **keys)


def test_a_source_that_changed_while_its_job_was_interrupted(changing, tmp_path, monkeypatch):
    """It fails with the first difference; without the progress it starts over. Seen to fail (duplicates and wrong
    labels) without _check_contents."""
    source, change, message = changing
    interrupt(monkeypatch, tmp_path / "store", source=source)
    change()
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path / "store", source=source)
    assert "\n" not in str(raised.value) and "progress.npz" in str(raised.value)
    (tmp_path / "store" / "progress.npz").unlink()
    run(tmp_path / "store", source=source)
    run(tmp_path / "new", source=source)
    assert (tmp_path / "store" / "manifest.json").read_text() == (tmp_path / "new" / "manifest.json").read_text()


def test_progress_without_a_summary_is_resumed(tmp_path, monkeypatch, capsys):
    """As older versions wrote it."""
    keys = {"source": f"folder:{class_folders(tmp_path / 'p')}"}
    interrupt(monkeypatch, tmp_path / "store", **keys)
    file = tmp_path / "store" / "progress.npz"
    saved = dict(np.load(file))
    record = json.loads(saved.pop("record").tobytes())
    del record["notes"]["contents"]
    np.savez(file, record=np.frombuffer(json.dumps(record).encode(), np.uint8), **saved)
    assert run(tmp_path / "store", **keys)["examples"] == 9
    assert "resuming after 2 train images" in capsys.readouterr().err


@pytest.mark.parametrize(("others", "words"), [
    ([f"{i:05d}" for i in range(3000)], ""),
    ([f"{i:05d}" for i in range(3001)], "one has 3,000 files and other 3,001; .* the 8 files after file 3,000"),
    ([f"{i:05d}" for i in range(3000) if i != 1000], "3,000 files and other 2,999; .* after file 1,000, '00999'"),
    ([f"{i:05d}" for i in range(400)], "3,000 files and other 400; .* 8 files after file 400, '00399'"),
    ([], "only one has|8 files after file 0"),
])
def test_the_first_difference_of_large_sources(others, words):
    """The number of marks is bounded at any size, and they locate the difference in either direction."""
    one, other = (contents.summarize(entries) for entries in ([f"{i:05d}" for i in range(3000)], others))
    assert len(one["marks"]) < contents.MARKS and json.loads(json.dumps(one)) == one
    found = contents.difference(one, other, ("one", "other"))
    assert bool(found) == bool(words) and (not words or re.search(words, found))
    assert bool(contents.difference(other, one, ("other", "one"))) == bool(words)


def test_a_digest_does_not_depend_on_where_the_files_lie_nor_on_the_unicode_form(tmp_path):
    for folder, form in (("x", "NFC"), ("y/z", "NFD")):
        picture(tmp_path / folder / unicodedata.normalize(form, "é") / "1.png")
        picture(tmp_path / folder / "f" / "caf\udce9.png")
        write_npz(tmp_path / folder / "a.npz", np.arange(4))
    for kind, rest in (("folder", ""), ("npz", "/*.npz")):
        (tmp_path / "x" / "a.npz").touch()
        one, other = (sources.open_source(f"{kind}:{tmp_path}/{where}{rest}", 4, 0) for where in ("x", "y/z"))
        assert one.contents == other.contents and one.contents["count"] == (2 if kind == "folder" else 1)


def classes_of(root, capsys, workdir, **keys):
    """The stored class names, and the log."""
    run(workdir, source=f"folder:{root}", **keys)
    return store.load_manifest(prepare.storage.path(workdir))["class_names"], capsys.readouterr().err


def test_of_two_paths_to_a_folder_the_first_by_name_is_taken(tmp_path, capsys, monkeypatch):
    """In whatever order the disk lists them, and it is logged. Seen to fail without `sorted` in storage.listing."""
    root = class_folders(tmp_path / "p", "bd")
    (root / "c").symlink_to("b")
    (root / "a").symlink_to("d")
    (root / ".a").symlink_to("b")
    walk = os.walk

    def backwards(*arguments, **keys):
        for parent, folders, names in walk(*arguments, **keys):
            folders.sort(reverse=True)
            yield parent, folders, names

    for i in range(2):
        names, said = classes_of(root, capsys, tmp_path / f"store{i}")
        assert names == ["a", "b"] and "skipping c (the same folder as b), d (the same folder as a)" in said
        assert "train: 2 classes: a, b" in said
        monkeypatch.setattr(os, "walk", backwards)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path, capsys):
    """Within a folder, and between the training and the test images. Seen to fail without nfc in Folder."""
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    root = class_folders(tmp_path / "p", ["a", nfc, nfd])
    test = class_folders(tmp_path / "t", [nfd, "a"])
    names, said = classes_of(root, capsys, tmp_path / "store", test_source=f"folder:{test}")
    picture(test / "two\nlines" / "0.png")
    with pytest.raises(UserError, match=r"lack: 'two\\nlines'"):
        run(tmp_path / "other", source=f"folder:{root}", test_source=f"folder:{test}")
    assert names == ["a", nfc] and "differ only in Unicode form are one class" in said
    opened = store.Store.open(tmp_path / "store")
    assert opened.split("train").labels(np.arange(9)).tolist() == [0] * 3 + [1] * 6
    assert opened.split("test").labels(np.arange(6)).tolist() == [0] * 3 + [1] * 3


def test_folders_named_like_splits_are_reported(tmp_path, capsys):
    for name in ("train2017", "val2017"):
        class_folders(tmp_path / "p" / name, "ab")
    _, said = classes_of(tmp_path / "p", capsys, tmp_path / "store")
    assert "train: 2 classes: train2017, val2017" in said
    assert f"source=folder:{tmp_path}/p/train2017 and --config.test_source=folder:{tmp_path}/p/val2017" in said
    _, said = classes_of(tmp_path / "p" / "train2017", capsys, tmp_path / "other")
    assert "named like splits" not in said


def test_a_workdir_among_the_pictures_is_no_class(tmp_path, capsys):
    """It is recognized by its config.json; a config.json of something else does not count."""
    root = class_folders(tmp_path / "p", "ab")
    picture(root / "runs" / "one" / "figures" / "palette.png")
    (root / "runs" / "one" / "config.json").write_text('{"job": "prepare"}')
    (root / "b" / "config.json").write_text('{"job": "clown"}')
    names, said = classes_of(root, capsys, tmp_path / "store")
    assert names == ["a", "b"] and "skipping the workdirs of jobs: runs/one" in said
    (root / "config.json").write_text('{"job": "prepare"}')
    with pytest.raises(UserError, match="is the workdir of a job"):
        run(tmp_path / "other", source=f"folder:{root}")


@pytest.mark.parametrize(("shape", "labels"), [((10**11, 5, 5, 3), (10**11,)), ((10**30, 5, 5, 3), None)])
def test_a_count_that_is_made_up_sizes_no_allocation(tmp_path, shape, labels):
    """Seen to fail (MemoryError, OverflowError) without the size in npz._header."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, dtype, size in (("images", "|u1", shape), ("labels", "<i8", labels)):
            data = io.BytesIO()
            if size:
                np.lib.format.write_array_header_1_0(data, {"descr": dtype, "fortran_order": False, "shape": size})
                archive.writestr(f"{name}.npy", data.getvalue() + bytes(100))
    with pytest.raises(UserError, match="images ends early"):
        run(tmp_path / "store", source=f"npz:{tmp_path}/a.npz")
