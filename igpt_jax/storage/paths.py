"""Paths on local disks and in buckets (gs://, s3://): parsing, comma lists, globs, listings."""

import contextlib
import errno
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
NO_ANSWER = re.compile("RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED")
UNREACHABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET)


def path(text: str | os.PathLike) -> epath.Path:
    """The path of a command line or config, with ~ expanded.

    Raises:
      UserError: the path is empty, or has a scheme other than gs:// and s3://.
    """
    prepare_epath()
    text = os.fspath(text)
    if not text:
        raise UserError("a path is empty. Give a local path, gs://BUCKET/... or s3://BUCKET/...")
    if "://" in text and not text.startswith(SCHEMES):
        raise UserError(f"path {text!r} has an unsupported scheme. Give a local path, gs://BUCKET/... or "
                        "s3://BUCKET/...")
    if re.match("(gs|s3):/(?!/)", text):
        raise UserError(f"path {text!r} has one slash after its scheme. Write gs://BUCKET/... or s3://BUCKET/...")
    return _local(os.path.expanduser(text)) if "://" not in text else epath.Path(text)


def _local(text: str) -> epath.Path:
    """A local path. /gs/... becomes /../gs/..., because epath reads /gs/... as gs://..."""
    return epath.Path(re.sub(r"^/+(?=(gs|s3|az|hf)(/|$))", "/../", text))


def is_local(path: epath.Path) -> bool:
    """Whether `path` is on a file system of this machine, not in a bucket."""
    return not os.fspath(path).startswith(SCHEMES)


def absolute(path: epath.Path) -> epath.Path:
    """`path` as an absolute path, which Orbax and TensorStore need.

    Raises:
      UserError: TensorStore would write to another path: it reads `\\` as `/`, and takes names to be UTF-8.
    """
    if not is_local(path):
        return path
    text = os.path.abspath(path)
    if "\\" in text:
        raise UserError(f"path {text} has a backslash, which TensorStore reads as '/'. Rename that folder.")
    try:
        is_utf8 = text.encode() == os.fsencode(text)
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        raise UserError(f"path {text!r} is not UTF-8, which TensorStore needs. Rename that folder"
                        + (".", ", or set LC_ALL=C.UTF-8.")[sys.getfilesystemencoding() != "utf-8"])
    return _local(text)


@functools.cache
def prepare_epath() -> None:
    """Patches epath, once.

    - `Path.glob` takes the folder's own name literally. epath, and Orbax through it, reads `[` in it as a pattern.
    - gs:// paths use fsspec. epath would import TensorFlow for them, which takes 5 seconds and 665 MiB.
    """
    os.environ.setdefault("EPATH_USE_TF", "0")
    original = gpath._GPath.glob
    gpath._GPath.glob = lambda self, pattern: original(type(self)(glob.escape(os.fspath(self))), pattern)


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Raises UserError in place of the errors of reading `path`."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Give a file.") from None
    except (OSError, ImportError) as error:  # ImportError: the bucket's client is not installed
        raise UserError(f"{path} cannot be read: {error}") from error


def children(path: epath.Path) -> list[epath.Path]:
    """The files and folders in a folder, sorted by name.

    Raises:
      UserError: the folder is missing or cannot be read.
    """
    with readable(path):
        return sorted(path.iterdir(), key=lambda child: child.name)


def patterns(text: str) -> list[str]:
    """The paths and globs of a comma list. Commas in the name of an existing file or folder do not split it."""
    found, pieces = [], text.split(",")
    while pieces:
        # The longest run of pieces that exists as one name is taken, else the first piece. A scheme starts a new path.
        end = next((i for i, piece in enumerate(pieces) if i and "://" in piece), len(pieces))
        joined = [",".join(pieces[:count]) for count in range(end, 1, -1)]
        names = [name for text in joined for name in (text, text.strip())]
        name = next((name for name in names if _name_exists(name)), pieces[0])
        del pieces[:name.count(",") + 1]
        found.append(name)
    return [pattern for pattern in map(str.strip, found) if pattern]


def _name_exists(pattern: str) -> bool:
    """Whether `pattern` exists up to its last component with a comma; components after that may be globs."""
    before, comma, rest = pattern.rpartition(",")
    with contextlib.suppress(UserError, OSError, ImportError):
        return path(before + comma + rest.partition("/")[0]).exists()
    return False


def matching(pattern: str) -> list[epath.Path]:
    """The existing paths that match a path or glob pattern, sorted.

    A component is a pattern only if nothing with exactly that name exists.

    Raises:
      UserError: nothing matches.
    """
    given = path(pattern)
    found, last = [epath.Path()], len(given.parts) - 1
    with readable(given):
        for i, component in enumerate(given.parts):
            found = [match for folder in found for match in _matches(folder, component, i == last)]
    if not found:
        raise UserError(f"{pattern!r} matches nothing. Check the path.")
    return sorted(found)


def _matches(folder: epath.Path, component: str, last: bool) -> list[epath.Path]:
    literal = folder / component
    if not glob.has_magic(component):
        return [literal] if not last or literal.exists() else []
    if literal.exists():
        return [literal]
    if "**" in component:
        raise UserError(f"{component!r} cannot be used as a pattern. * stands for one folder, as in 'a/*/*.png'.")
    return list(folder.glob(component))


def tensorstore_spec(path: epath.Path) -> dict[str, Any]:
    """TensorStore's spec of a folder as a key-value store. $AWS_ENDPOINT_URL names an emulator or other S3 service."""
    if is_local(path):
        return {"driver": "file", "path": os.path.abspath(absolute(path)) + "/"}
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, folder = rest.partition("/")
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": folder.rstrip("/") + "/"}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec


def listing(folder: epath.Path, skipped: dict[str, str] | None = None) -> dict[str, int]:
    """The sizes in bytes of all files below a folder, by path relative to it. Hidden files (`.name`) are left out.

    Links are followed, but each folder is listed once: of two paths to one folder in the same parent, under the first
    by name.

    Args:
      skipped: receives the other paths to a folder, each with the path under which the folder is listed.

    Raises:
      UserError: the folder is missing or cannot be read.
    """
    with readable(folder):
        if not is_local(folder):
            system, root = fsspec.core.url_to_fs(os.fspath(folder))
            files = {name.removeprefix(root).lstrip("/"): entry["size"]
                     for name, entry in system.find(root, detail=True).items()}
            return {name: size for name, size in files.items() if not f"/{name}".count("/.")}
        sizes, listed = {}, {os.path.realpath(folder): "."}
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            above = os.path.relpath(parent, folder)
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")
                          and not _listed(os.path.join(parent, name), os.path.join(above, name), listed, skipped)]
            for name in (name for name in names if not name.startswith(".")):
                file = os.path.join(parent, name)
                size = os.stat(file).st_size if os.path.exists(file) else 0  # a broken link
                sizes[os.path.relpath(file, folder).replace(os.sep, "/")] = size
        return sizes


def _raise(error: OSError) -> None:
    raise error


def _listed(folder: str, name: str, listed: dict[str, str], skipped: dict[str, str] | None) -> bool:
    """Whether `folder` is already in `listed` under another path. If not, adds it as `name`."""
    name, real = os.path.normpath(name), os.path.realpath(folder)
    if first := listed.get(real):
        if skipped is not None:
            skipped[name] = first
        return True
    listed[real] = name
    return False


def encoded(text: str) -> bytes:
    """`text` in UTF-8. Bytes of a file name that are not UTF-8 are escaped as in Python's strings: caf\\udce9."""
    return text.encode(errors="backslashreplace")


def unreachable(error: Exception) -> bool:
    """Whether a bucket or a shared disk did not answer, or refused the credentials: its files may be whole."""
    if isinstance(error, UserError):  # its own words may be a path's, or those of devices
        return isinstance(error.__cause__, Exception) and unreachable(error.__cause__)
    return getattr(error, "errno", None) in UNREACHABLE or bool(NO_ANSWER.search(str(error)))
