"""Users' paths: local, gs:// or s3://. Expansion, comma lists, globs and listings."""

import contextlib
import functools
import glob
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath
from etils.epath import gpath

from igpt_jax.config import UserError

Path = epath.Path
SCHEMES = ("gs://", "s3://")


def path(text: str | os.PathLike) -> epath.Path:
    """The path that a user typed, with ~ expanded.

    Raises:
      UserError: an empty path, or a scheme other than gs:// and s3://.
    """
    prepare_epath()
    text = os.fspath(text)
    if not text:
        raise UserError("a path is empty. Give a local path, gs://BUCKET/... or s3://BUCKET/...")
    if "://" in text and not text.startswith(SCHEMES):
        raise UserError(f"path {text!r}: storage is a local path, gs:// or s3://.")
    if re.match("(gs|s3):/(?!/)", text):
        raise UserError(f"path {text!r} has one slash after its scheme. Write gs://BUCKET/... or s3://BUCKET/...")
    return _local(os.path.expanduser(text)) if "://" not in text else epath.Path(text)


def _local(text: str) -> epath.Path:
    """A path of this machine, as /../gs/... where it is /gs/..., which epath would take for gs://..."""
    return epath.Path(re.sub(r"^/+(?=(gs|s3|az|hf)(/|$))", "/../", text))


def is_local(path: epath.Path) -> bool:
    """Whether `path` lies on a file system of this machine, not in a bucket."""
    return not os.fspath(path).startswith(SCHEMES)


def absolute(path: epath.Path) -> epath.Path:
    """`path` from the root, as Orbax and TensorStore need it.

    Raises:
      UserError: TensorStore would write somewhere else. It reads `\\` as `/`, and names are UTF-8 to it.
    """
    if not is_local(path):
        return path
    whole = os.path.abspath(path)
    if "\\" in whole:
        raise UserError(f"path {whole} has a backslash, which TensorStore reads as '/'. Rename that folder.")
    try:
        alike = whole.encode() == os.fsencode(whole)
    except UnicodeEncodeError:
        alike = False
    if not alike:
        raise UserError(f"path {whole!r} is not UTF-8, as TensorStore needs it. Rename that folder"
                        + (".", ", or set LC_ALL=C.UTF-8.")[sys.getfilesystemencoding() != "utf-8"])
    return _local(whole)


@functools.cache
def prepare_epath() -> None:
    """Makes `Path.glob` take the folder's own name literally: epath, and Orbax with it, took `[` in it for a pattern.

    Keeps epath from importing TensorFlow for gs:// paths, which takes 5 seconds and 665 MiB; fsspec serves them.
    """
    os.environ.setdefault("EPATH_USE_TF", "0")
    former = gpath._GPath.glob
    gpath._GPath.glob = lambda self, pattern: former(type(self)(glob.escape(os.fspath(self))), pattern)


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Turns the errors of reading what a user named into one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a file is needed.") from None
    except (OSError, ImportError) as error:  # ImportError: the bucket's client is not installed
        raise UserError(f"{path} cannot be read: {error}") from None


def children(path: epath.Path) -> list[epath.Path]:
    """What lies in a folder that the user named, sorted by name.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with readable(path):
        return sorted(path.iterdir(), key=lambda child: child.name)


def patterns(typed: str) -> list[str]:
    """The paths and globs of a comma list. Where a name with commas exists, they do not split it."""
    found, pieces = [], typed.split(",")
    while pieces:
        end = next((i for i, piece in enumerate(pieces) if i and "://" in piece), len(pieces))
        wholes = [",".join(pieces[:count]) for count in range(end, 1, -1)]
        whole = next((each for whole in wholes for each in (whole, whole.strip()) if _has_such_a_name(each)), pieces[0])
        del pieces[:whole.count(",") + 1]
        found.append(whole)
    return [pattern for pattern in map(str.strip, found) if pattern]


def _has_such_a_name(pattern: str) -> bool:
    """Whether `pattern` exists up to its last name with a comma."""
    before, comma, rest = pattern.rpartition(",")
    with contextlib.suppress(UserError, OSError, ImportError):
        return path(before + comma + rest.partition("/")[0]).exists()
    return False


def matching(pattern: str) -> list[epath.Path]:
    """The existing paths that a path or glob pattern of the user stands for, sorted. Each part is a pattern only where
    nothing of that very name exists.

    Raises:
      UserError: there are none.
    """
    given = path(pattern)
    found, last = [epath.Path()], len(given.parts) - 1
    with readable(given):
        for i, part in enumerate(given.parts):
            found = [match for folder in found for match in _below(folder, part, i == last)]
    if not found:
        raise UserError(f"{pattern!r} matches nothing. Check the path.")
    return sorted(found)


def _below(folder: epath.Path, part: str, last: bool) -> list[epath.Path]:
    literal = folder / part
    if not glob.has_magic(part):
        return [literal] if not last or literal.exists() else []
    if literal.exists():
        return [literal]
    if "**" in part:
        raise UserError(f"{part!r} is no pattern here: * stands for one folder, as in 'a/*/*.png'.")
    return list(folder.glob(part))


def tensorstore_spec(path: epath.Path) -> dict[str, Any]:
    """TensorStore's key-value store of a folder. Emulators and other S3 services are named by $AWS_ENDPOINT_URL."""
    if is_local(path):
        return {"driver": "file", "path": os.path.abspath(absolute(path)) + "/"}
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, folder = rest.partition("/")
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": folder.rstrip("/") + "/"}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec


def listing(folder: epath.Path, passed_over: dict[str, str] | None = None) -> dict[str, int]:
    """The files below a folder, as their paths from there with slashes -> bytes; hidden ones (`.name`) are left out.

    Links are followed, each folder once. Of two paths to one folder in the same parent, the first by name is taken.

    Args:
      passed_over: takes up the other paths to a folder -> the path that was taken.

    Raises:
      UserError: it is missing or cannot be read.
    """
    with readable(folder):
        if not is_local(folder):
            found = fsspec.core.url_to_fs(os.fspath(folder))
            files = {name.removeprefix(found[1]).lstrip("/"): entry["size"]
                     for name, entry in found[0].find(found[1], detail=True).items()}
            return {name: size for name, size in files.items() if not f"/{name}".count("/.")}
        sizes, taken = {}, {os.path.realpath(folder): "."}
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            above = os.path.relpath(parent, folder)
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")
                          and not _taken(os.path.join(parent, name), os.path.join(above, name), taken, passed_over)]
            for name in (name for name in names if not name.startswith(".")):
                file = os.path.join(parent, name)
                size = os.stat(file).st_size if os.path.exists(file) else 0  # a link that leads nowhere
                sizes[os.path.relpath(file, folder).replace(os.sep, "/")] = size
        return sizes


def _raise(error: OSError) -> None:
    raise error


def _taken(folder: str, name: str, taken: dict[str, str], passed_over: dict[str, str] | None) -> bool:
    """Whether `folder`, known as `name`, was taken before by another path; else it is now."""
    name, real = os.path.normpath(name), os.path.realpath(folder)
    if first := taken.get(real):
        if passed_over is not None:
            passed_over[name] = first
        return True
    taken[real] = name
    return False


def encoded(text: str) -> bytes:
    """UTF-8; a name that is not UTF-8 shows as in Python's strings, caf\\udce9."""
    return text.encode(errors="backslashreplace")
