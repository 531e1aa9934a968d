"""The target of convert: written to a staging folder, then moved; replaces only files that convert wrote.

certificate.json in the workdir holds the target's absolute path and lists its files with sizes and times. The next run
with this workdir and target recognizes its files by that list, and keeps all others.

A run can be killed at any moment, and the next one must still know which files are convert's. So the order is:

1. The certificate is written with this target's path and the list of the former files. A staging folder is now known to
   be convert's.
2. The new files are written into the staging folder, which is in the target's folder, so that moving them is a rename.
3. The certificate is written again with the list of the new files.
4. The former files are moved away, then the new ones into place, those last by which a folder is taken for a model.
5. The staging folder is removed, and the former files with it.

After a kill in step 4 some listed files are missing. The next run accepts that and replaces those that are there. After
a kill between steps 3 and 4 the former files no longer match the list, and the next run refuses them in one line.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.weights import openai

CERTIFICATE = "certificate.json"
LAST = (".json", ".py", ".index")  # move last: without these files a folder is not taken for a model

Files = dict[str, list[int]]  # path below the folder -> bytes, and seconds of its time (0 in a bucket)


class Target:
    """What `convert_to` names: some entries of a folder.

    Attributes:
      path: what the user gave, from the root and without links.
      folder: where they appear.
      entry: the step of `orbax`, the prefix of `openai`; empty: all that the folder holds.

    Raises:
      UserError: something else is in the way.
    """

    def __init__(self, kind: str, given: str, step: int, workdir: str):
        """Args: kind and path of `convert_to`, the step of the weights, and the job's workdir."""
        path = storage.path(openai.prefix_of(given) if kind == "openai" else given)
        self._local = storage.is_local(path)
        if not self._local and kind != "orbax":
            raise UserError(f"convert_to={kind}:{given}: these files are written to a local folder. Name one, and copy "
                            "it from there.")
        path = storage.Path(os.path.realpath(path)) if self._local else path
        self.folder, self.entry = {"orbax": (path / "checkpoints", str(step)),
                                   "openai": (path.parent, path.name)}.get(kind, (path, ""))
        self.path = os.fspath(path)
        self._kind, self._name = kind, f"{kind}:{self.path}"
        self._stage = self.folder / f".{self.entry or 'convert'}.unfinished"
        self._file = storage.path(workdir) / CERTIFICATE
        self._former = self._file.read_bytes() if self._file.exists() else None
        self._mine, self._begun = _listed(self._former, self._name)
        self._refuse_what_is_not_mine()

    def record(self, certificate: Mapping[str, Any]) -> None:
        """Publishes the certificate (JSON values), with this target's path and files."""
        record = {**certificate, "place": self._name, "files": self._mine}
        storage.publish(self._file, json.dumps(record, indent=2) + "\n")

    @contextlib.contextmanager
    def appearing(self, certificate: Mapping[str, Any]) -> Iterator[Path]:
        """A folder to write into, whose entries appear in `folder` when all are written.

        Of `orbax` it is the folder to which `checkpoints` belongs. Where writing fails, all is as it was.
        """
        self.record(certificate)
        if not self._local:  # a bucket has no rename; Orbax replaces what is there, which is convert's
            yield self.folder.parent
            self._mine = self._files_in(self.folder)
            return
        stage, new = Path(self._stage), not self.folder.exists()
        shutil.rmtree(stage, ignore_errors=True)
        made, former = stage / "made", stage / "former"
        try:
            with _one_line(self.folder):
                made.mkdir(parents=True)
                former.mkdir()
            yield made
            made = made / "checkpoints" if self._kind == "orbax" else made
            entries = sorted(os.listdir(made), key=lambda name: (os.path.splitext(name)[1] in LAST, name))
            replaced = {name.partition("/")[0] for name in self._mine if (self.folder / name).exists()}
            self._refuse((name for name in entries if name not in replaced and os.path.lexists(self.folder / name)),
                         "is already there, and convert did not write it. Move it away")
        # Ctrl-C and stop signals too: nothing has been moved yet, so removing the staging folder undoes everything.
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            with contextlib.suppress(OSError):
                if new:
                    os.rmdir(self.folder)
            self._restore()
            raise
        self._mine = self._files_in(made)
        self.record(certificate)
        for name in replaced:
            os.replace(self.folder / name, former / name)
        for name in entries:
            os.replace(made / name, self.folder / name)
        shutil.rmtree(stage)

    def _restore(self) -> None:
        if self._former is None:
            self._file.unlink(missing_ok=True)
        else:
            storage.publish(self._file, self._former)

    def _refuse_what_is_not_mine(self) -> None:
        there = {name: self._signature(self.folder, name) for name in self._mine}
        self._refuse((name for name, known in self._mine.items() if there[name] not in (None, known)),
                     "has changed since convert wrote it. Move it away")
        if self._kind == "orbax" and self._mine:
            step = self.folder / self.entry
            others = (f"{self.entry}/{name}" for name in (storage.listing(step) if step.exists() else ()))
            self._refuse((name for name in others if name not in self._mine),
                         "was not written by convert. Move it away")
        elif self._kind == "orbax":
            self._refuse([self.entry] if _occupied(self.folder / self.entry) else [], "is already there. Remove it")
        elif self._kind == "openai":
            with _one_line(self.folder):
                there = os.listdir(self.folder) if self.folder.exists() else []
            pattern = re.compile(re.escape(self.entry) + r"\.(index|data-\d+-of-\d+)")
            self._refuse((name for name in sorted(there) if pattern.fullmatch(name) and name not in self._mine),
                         "is already there. Remove it")
        elif not self._begun:
            self._refuse([""] if _occupied(self.folder) else [], "is already there. Remove it")
        if self._local and self._stage.exists() and not self._begun:
            raise UserError(f"convert_to: {self._stage} is in the way: another conversion writes there, or was killed. "
                            "Remove it when none is running.")

    def _refuse(self, names: Any, why: str) -> None:
        for name in names:
            raise UserError(f"convert_to: {self.folder / name} {why}, or name another path.")

    def _files_in(self, folder: Any) -> Files:
        """All of this target's files below a folder."""
        below = f"{self.entry}/" if self._kind == "orbax" else ""
        names = (below + name for name in storage.listing(storage.Path(folder) / below))
        return {name: self._signature(folder, name) for name in sorted(names)}

    def _signature(self, folder: Any, name: str) -> list[int] | None:
        """Bytes and seconds of a file; None where it is not there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self._local:
                found = os.stat(folder / name)
                # Size and time, not a hash: the weights of iGPT-XL are 27 GB, and every run would have to read them
                # first. Whole seconds, because some file systems keep no more.
                return [found.st_size, int(found.st_mtime)]
            return [(folder / name).stat().length, 0]
        return None


def _listed(certificate: bytes | None, place: str) -> tuple[Files, bool]:
    """The files that a certificate says convert has written to `place`, and whether it is of that place at all."""
    try:
        recorded = storage.parse_json(certificate or b"")
        if recorded["place"] != place:
            return {}, False
        files = {name: [int(size), int(time)] for name, (size, time) in recorded["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, False
    # The certificate is a file that anybody may have edited. A name such as ../x must not lead out of the target's
    # folder.
    inside = all(name == os.path.normpath(name) and name.partition("/")[0] not in ("", ".", "..") for name in files)
    return (files, True) if inside else ({}, False)


def _occupied(path: storage.Path) -> bool:
    with _one_line(path):
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def _one_line(path: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"convert_to: {path} cannot be written: {error.strerror or error}. Name another path."
                        ) from None
