"""Tar shards in webdataset's format. Nothing is unpacked to disk."""

import collections
import contextlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import images
from igpt_jax.data.sources import contents
from igpt_jax.data.sources.base import Item, Source, files_of, slice_of

LABEL_SUFFIXES = (".cls", ".json")
LABEL_KEYS = ("label", "cls")  # in .json
PROBED = 16  # first samples that decide whether the shards are labeled


class _Sample(NamedTuple):
    """The members of one key, found in the headers.

    Attributes:
      file: the tar file.
      name: of the picture, for the quarantine list.
      picture: offset of its data and size, bytes; None: there is none.
      label: suffix, offset and size of the member with the label; None: there is none.
      problem: why the sample cannot be used; empty: it can.
    """
    file: epath.Path
    name: str
    picture: tuple[int, int] | None
    label: tuple[str, int, int] | None
    problem: str = ""


class Tar(Source):
    """`tar:PATTERN`: uncompressed tar files (a glob), sorted by name. A slice takes whole files.

    - Members that share their path up to the first dot of the file name are one sample: a picture (.jpg, .jpeg, .png or
      .webp) and its class number, in `.cls` or under "label" or "cls" of `.json`.
    - Shards whose first samples have no class, such as img2dataset's, are unlabeled.
    - Other members are counted and reported.
    - Absolute paths, `..`, links and devices go to quarantine. So do samples whose label file has no class in labeled
      shards, and samples with a class in unlabeled ones. A sample without a label file among labeled ones is an error.
    """

    def __init__(self, argument: str, image_size: int, seed: int, shard: tuple[int, int]):
        files = files_of("tar", argument)
        self.contents = contents.of_files(files)
        self._samples: list[_Sample] = []
        self._skipped: collections.Counter = collections.Counter()
        for i in slice_of(len(files), shard):
            self._samples += self._index(files[i])
        good = [sample for sample in self._samples if not sample.problem]
        described = itertools.islice((sample for sample in good if sample.label), PROBED)
        self._labelled = any(_label_of(sample) is not None for sample in described)
        lone = next((sample for sample in good if not sample.label), None)
        if self._labelled and lone:
            raise UserError(f"{lone.file}: {lone.name} has no .cls or .json, and others have. Label all or none.")
        self.count, self.sizes, self.skipped = len(self._samples), set(), dict(sorted(self._skipped.items()))

    def items(self, start: int) -> Iterator[Item]:
        opened, stream = None, None
        try:
            for sample in self._samples[start:]:
                if sample.file != opened:
                    if stream:
                        stream.close()
                    opened, stream = sample.file, sample.file.open("rb")
                yield self._item(sample, stream)
        finally:
            if stream:
                stream.close()

    def _item(self, sample: _Sample, stream: Any) -> Item:
        name = f"{sample.file.name}:{sample.name}"

        def unusable(reason: str) -> Item:
            def refuse() -> bytes:
                raise images.Unusable(reason)
            return Item(name, None, refuse)

        try:
            if sample.problem:
                raise images.Unusable(sample.problem)
            label = _label_in(sample, stream) if sample.label else None
            if (label is not None) != self._labelled:
                raise images.Unusable("it has no class, and others have one" if self._labelled else
                                      "it has a class, and others have none")
        except images.Unusable as reason:
            return unusable(str(reason))
        return Item(name, label, _read(stream, *sample.picture))

    def _index(self, file: epath.Path) -> list[_Sample]:
        """The samples of one file, in order, from its headers alone."""
        found: dict[str, _Sample] = {}
        with file.open("rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    for member in archive:
                        archive.members = []  # tarfile would keep all of them in memory
                        self._add(found, file, member)
                    # At a damaged header tarfile ends without an error, as it does at the block of zeros after the
                    # last.
                    stream.seek(archive.offset)
                    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise tarfile.ReadError(f"damaged header at byte {archive.offset:,}")
                    end = stream.seek(0, 2)
            except (tarfile.TarError, OSError, ValueError, EOFError) as error:
                if storage.unreachable(error):
                    raise
                raise UserError(f"{file} is not a readable, uncompressed tar file ({error}). Restore it from a copy, "
                                "or unpack a .tar.gz with gunzip.") from None
        samples = [self._whole(sample, end) for sample in found.values()]
        if not samples:
            raise UserError(f"{file} has no pictures. Leave it out of the pattern.")
        return samples

    def _add(self, found: dict[str, _Sample], file: epath.Path, member: tarfile.TarInfo) -> None:
        """Adds a member to its sample in `found`, or counts it as skipped."""
        if member.isdir():
            return
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key, suffix = folder + slash + stem, f".{suffix.lower()}"
        problem = _problem(member)
        if problem:
            # The number keeps several bad members of one name apart, and none of them replaces a good sample.
            found[f"{member.name} {len(found)}"] = _Sample(file, member.name, None, None, problem)
            return
        if base.startswith(".") or suffix not in (*images.SUFFIXES, *LABEL_SUFFIXES):
            kind = "hidden" if not stem else "no ending" if suffix == "." else suffix
            self._skipped[kind] += 1
            return
        extent = member.offset_data, member.size
        sample = found.setdefault(key, _Sample(file, key, None, None))
        if suffix in images.SUFFIXES:
            if sample.picture:
                found[f"{member.name} {len(found)}"] = _Sample(file, member.name, None, None, "a second picture of "
                                                               "one key")
                return
            found[key] = sample._replace(name=member.name, picture=extent)
        elif not sample.label or suffix == ".cls":
            found[key] = sample._replace(label=(suffix, *extent))

    def _whole(self, sample: _Sample, end: int) -> _Sample:
        """`sample`, with its problem where it has no picture or the file ends early, at byte `end`."""
        if not sample.problem and sample.picture is None:
            return sample._replace(problem="a label without a picture")
        extents = [sample.picture, sample.label and sample.label[1:]]
        if any(extent and sum(extent) > end for extent in extents):
            return sample._replace(problem="the tar file ends before it")
        return sample


def _problem(member: tarfile.TarInfo) -> str:
    """Why a member cannot be used; empty if it can."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its path leads out of the archive"
    if member.issym() or member.islnk():
        return "a link"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    return images.TOO_LARGE if member.size > images.MAX_BYTES else ""


def _read(stream: Any, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _label_of(sample: _Sample) -> int | None:
    """The sample's class; None if it has none or it cannot be read."""
    with sample.file.open("rb") as stream, contextlib.suppress(images.Unusable):
        return _label_in(sample, stream)


def _label_in(sample: _Sample, stream: Any) -> int | None:
    """The class number in a sample's .cls or .json; None if the .json has none.

    Raises:
      images.Unusable: the value is not a class number.
    """
    suffix, offset, size = sample.label
    try:
        value = _read(stream, offset, size).decode("utf-8-sig").strip()
        if suffix == ".json":
            value = json.loads(value)
            value = next((value[key] for key in LABEL_KEYS if value.get(key) is not None), None
                         ) if isinstance(value, dict) else None
            if value is None:
                return None
        if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value):
            value = int(value)
        if type(value) in (int, float) and 0 <= value < 2**31 and value == int(value):  # pandas writes 3.0
            return int(value)
    except (ValueError, RecursionError):
        pass
    raise images.Unusable(f"its {suffix} has no class number from 0 to 2^31 - 1")
