"""Paths, publishing, appended lines and locks, on a local disk and under a bucket's rules."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS, patience

from igpt_jax import storage
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.runtime.job import run_job
from igpt_jax.storage import files, lines, locks, paths


def put(path, text):
    """Writes a file as a bucket does: a reader sees the old content or the new one."""
    new = path.with_name("put")
    new.write_text(text)
    os.replace(new, path)


@pytest.fixture
def as_bucket(monkeypatch):
    """A local folder under a bucket's rules: no rename, no append, no flock. The lock's thread and the test see each
    other's writes whole, as in a bucket."""
    for module in (storage, files, lines, locks, paths):
        monkeypatch.setattr(module, "is_local", lambda path: False)
    monkeypatch.setattr(locks, "publish", put)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)


@pytest.mark.parametrize(("text", "local"), [("a/b", True), ("/a", True), ("gs://b/a", False), ("s3://b/a", False)])
def test_kind_of_path(text, local):
    assert storage.is_local(storage.path(text)) is local
    assert os.fspath(storage.path(text)) == text


@pytest.mark.parametrize("text", ["/gs/group/run", "/s3", "/gs"])
def test_a_local_folder_named_like_a_bucket(text):
    """Seen to fail: epath reads /gs/group as gs://group, so a cluster's disk could not be used."""
    path = storage.path(text)
    assert storage.is_local(path) and storage.is_local(storage.absolute(path / "a"))
    assert os.path.normpath(os.fspath(path)).lstrip("/") == text.lstrip("/")


@pytest.mark.parametrize("text", ["", "ftp://host/a", "gs:/bucket/a", "s3:/bucket"])
def test_impossible_path(text):
    with pytest.raises(UserError):
        storage.path(text)


def test_missing_paths_are_named(tmp_path):
    for read in (storage.read, storage.children, storage.read_lines):
        with pytest.raises(UserError, match="nowhere"):
            read(storage.path(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="folder"):
        storage.read(storage.path(tmp_path))
    with pytest.raises(UserError, match="matches nothing"):
        storage.matching(str(tmp_path / "*.npz"))


def test_matching_is_sorted(tmp_path):
    for name in ("b/2.npz", "b/1.npz", "a/3.npz", "a/3.txt"):
        storage.publish(storage.path(tmp_path / name), "")
    found = storage.matching(str(tmp_path / "*" / "*.npz"))
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a/3.npz", "b/1.npz", "b/2.npz"]


@pytest.mark.parametrize(("pattern", "expected"), [
    ("s[1]", ["s[1]"]), ("s[1]/*", ["s[1]/a,b", "s[1]/x*"]), ("s[1]/x*", ["s[1]/x*"]), ("s?/x", ["s1/x"]),
    ("s*/x[*]", ["s[1]/x*"]), ("s[12]/*", ["s1/x"]), ("s*/x*", ["s1/x", "s[1]/x*"]), ("s*/none", []), ("**/x", []),
])
def test_existing_names_are_not_patterns(tmp_path, pattern, expected):
    """Each component by itself. Seen to fail with every component that has a bracket read as a pattern."""
    for name in ("s[1]/x*", "s[1]/a,b", "s1/x"):
        storage.publish(storage.path(tmp_path / "r[0]" / name), "")
    if expected:
        found = storage.matching(f"{tmp_path}/r[0]/{pattern}")
        assert [os.path.relpath(path, tmp_path / "r[0]") for path in found] == expected
    else:
        with pytest.raises(UserError, match="matches nothing|as a pattern"):
            storage.matching(f"{tmp_path}/r[0]/{pattern}")


@pytest.mark.parametrize(("text", "expected"), [
    ("a,b", ["a,b"]), ("c, a,b ,", ["c", "a,b"]), ("a,b,c", ["a,b", "c"]), ("a,c", ["a", "c"]), ("c*,d", ["c*", "d"]),
    ("a,b/*,c", ["a,b/*", "c"]), (" c", ["c"]), ("gs://b/a,gs://b/c", ["gs://b/a", "gs://b/c"]), ("", []),
])
def test_commas_in_existing_names_do_not_split_them(tmp_path, monkeypatch, text, expected):
    """Seen to fail with a plain split."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a", "c"):
        (tmp_path / name).mkdir()
    assert storage.patterns(text) == expected


@pytest.mark.parametrize(("folder", "message"), [("back\\slash", "backslash"), ("caf\udce9", "UTF-8")])
@pytest.mark.parametrize("inside", [False, True])
def test_a_workdir_that_tensorstore_misreads_is_refused(tmp_path, monkeypatch, capsys, folder, message, inside):
    """Given as --workdir, and as the current folder. Seen to fail without the check: the job ran."""
    if inside:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
    before = list(tmp_path.rglob("*"))
    workdir = "run" if inside else str(tmp_path / folder)
    assert run_job(lambda config, workdir: {}, parse("pretrain", base_config("pretrain")), workdir) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and list(tmp_path.rglob("*")) == before


def test_publish_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    """Seen to fail with a plain write_bytes in publish."""
    path = storage.path(tmp_path / "folder" / "file.json")
    storage.publish(path, "old")

    def full(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        storage.publish(path, b"new")
    assert path.read_text() == "old"
    assert [child.name for child in storage.children(path.parent)] == ["file.json"]


def test_names_that_are_not_utf8_are_written_out(tmp_path):
    """As in the report of such a folder. Seen to fail with a plain encode."""
    for file in (tmp_path / "report.html", tmp_path / "metrics.jsonl"):
        storage.publish(storage.path(file), "caf\udce9")
        assert file.read_text() == "caf\\udce9"
    writer = storage.LineWriter(storage.path(file))
    writer.write("caf\udce9")
    writer.close()
    assert storage.read_lines(storage.path(file)) == ["caf\\udce9"] * 2


def test_lines_over_two_runs(tmp_path):
    path = storage.path(tmp_path / "metrics.jsonl")
    for run in (["a", "b"], ["c"]):
        writer = storage.LineWriter(path)
        for line in run:
            writer.write(line)
        assert path.read_text().endswith(f"{run[-1]}\n"), "a line is on disk when write returns"
        writer.close()
    assert storage.read_lines(path) == ["a", "b", "c"]


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path):
    path = storage.path(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 1}\n{"st')
    writer = storage.LineWriter(path)
    writer.write('{"step": 2}')
    writer.close()
    assert storage.read_lines(path) == ['{"step": 1}', '{"st', '{"step": 2}']


class FillingDisk:
    """A raw file on a disk that takes `space` more bytes and is then full."""

    def __init__(self, file, space):
        self.file, self.space = file, space

    def write(self, data):
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(bytes(data[:self.space]))
        self.space -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_wait_for_a_full_disk_and_none_is_torn(tmp_path):
    """Seen to fail with a partly written line written again from its start."""
    path = storage.path(tmp_path / "metrics.jsonl")
    writer = storage.LineWriter(path)
    writer._file = disk = FillingDisk(writer._file, space=10)
    for line in ("first", "second", "third"):
        writer.write(line)
    assert writer.error.errno == errno.ENOSPC and path.read_text() == "first\nseco"
    disk.space = 100
    writer.write("fourth")
    assert writer.error is None
    writer.close()
    assert storage.read_lines(path) == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("name", ["run", "run[1]", "*", "a?"])
def test_sweep_removes_what_a_killed_publish_left(tmp_path, name):
    """Seen to fail with the folder's name read as a pattern, and with the files of another run in it removed."""
    tmp_path = tmp_path / name
    left = [tmp_path / ".result.json.abcd_123.tmp", tmp_path / "figures" / ".loss.png.xyz01234.tmp"]
    kept = [tmp_path / ".lock", tmp_path / "result.json", tmp_path / "figures" / "loss.png", tmp_path / ".mine.tmp",
            tmp_path / "other run" / "config.json", tmp_path / "other run" / ".result.json.abcd_123.tmp"]
    (tmp_path / "figures").mkdir(parents=True)
    (tmp_path / "other run").mkdir()
    for file in left + kept:
        file.write_text("")
    storage.sweep(storage.path(tmp_path))
    assert not any(file.exists() for file in left) and all(file.exists() for file in kept)


def test_lines_in_a_bucket_are_numbered_parts(tmp_path, as_bucket):
    path = storage.path(tmp_path / "metrics.jsonl")
    for run in (["a", "b"], ["c"]):
        writer = storage.LineWriter(path)
        for line in run:
            writer.write(line)
        writer.close()
    names = [child.name for child in storage.children(storage.path(tmp_path))]
    assert names == ["metrics-00001.jsonl", "metrics-00002.jsonl"]
    assert storage.read_lines(path) == ["a", "b", "c"]


def test_lock_refuses_a_second_job_and_ends_with_the_first(tmp_path):
    """Seen to fail without the flock, and with a lock that is only a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, SCRIPTS / "hold_lock.py", tmp_path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env=environment)
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by host .*, process {first.pid}, since"):
            with storage.lock(storage.path(tmp_path)):
                pass
    finally:
        first.kill()
        first.wait()
        first.stdin.close()
        first.stdout.close()
    with storage.lock(storage.path(tmp_path)):
        assert json.loads((tmp_path / locks.LOCK).read_text())["pid"] == os.getpid()
    with storage.lock(storage.path(tmp_path)):
        pass


def test_lock_in_a_bucket(tmp_path, as_bucket, monkeypatch):
    """Seen to fail where a lock with a heartbeat is read only once."""
    workdir, lock, sleep = storage.path(tmp_path), tmp_path / locks.LOCK, time.sleep

    def until_it_beats(seconds):  # however late its thread runs
        found = lock.read_text()
        while lock.read_text() == found:
            sleep(0.001)

    with storage.lock(workdir), monkeypatch.context() as patched:
        patched.setattr(time, "sleep", until_it_beats)
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            with storage.lock(workdir):
                pass
    assert not lock.exists()
    lock.write_text(json.dumps({"host": "another", "pid": 1, "start": "long ago"}))
    with storage.lock(workdir):  # no heartbeat: its job is dead
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_job_that_loses_its_bucket_lock_ends(tmp_path):
    """Slow writes can let two jobs start. The one whose lock was overwritten ends with exit code 2.

    Seen to fail with a heartbeat that does not read the lock before it writes.
    """
    command = [sys.executable, SCRIPTS / "hold_bucket_lock.py", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as job:
        assert job.stdout.readline() == "held\n"
        deadline = time.monotonic() + patience()
        while job.poll() is None:  # a heartbeat that read the lock just before overwrites the other one
            assert time.monotonic() < deadline
            put(tmp_path / locks.LOCK, json.dumps({"host": "other", "pid": 7, "start": "now"}))
            time.sleep(0.1)
        assert "in use by host other, process 7" in job.stderr.read()
    assert job.returncode == 2
