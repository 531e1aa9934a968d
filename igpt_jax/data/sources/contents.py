"""Summarizes the contents of a source in a few kilobytes, and finds the first difference between two summaries.

Slices and resumed jobs compare summaries to detect that their source has changed. A summary is a JSON object: the class
names, the number of files, the SHA-256 of their names and sizes in order, and *marks*. A mark is the digest up to a
file, with that file's name. Marks locate the first difference.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from igpt_jax import storage

MARKS = 512  # the most marks of a summary; a source of fewer files has one for each file


def nfc(name: str) -> str:
    """`name` in Unicode's form NFC, in which names are compared. macOS writes an accent as a separate character."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def on_one_line(names: Iterable[str]) -> str:
    """Names in a comma list, quoted if they contain newlines or other control characters."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def summarize(entries: Iterable[str], class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The summary of a source.

    Args:
      entries: a line for each file, in the source's order: its name, and its size if known.
      class_names: by class number.
    """
    running, marks, stride, count = hashlib.sha256(), [], 1, 0
    for count, entry in enumerate(map(nfc, entries), 1):
        data = entry.encode(errors="surrogatepass")  # a name need not be UTF-8
        running.update(len(data).to_bytes(8, "little") + data)
        if count % stride == 0:
            marks.append(f"{running.hexdigest()[:16]} {entry}")
            # The number of files is not known in advance. When the marks are full, every second one is dropped.
            if len(marks) == MARKS:
                marks, stride = marks[1::2], 2 * stride
    return {"classes": list(class_names), "count": count, "sha256": running.hexdigest(), "stride": stride,
            "marks": marks}


def of_files(files: Sequence[epath.Path], more: Sequence[Any] = ()) -> dict[str, Any]:
    """The summary of files, by their sizes and their names relative to the folder that contains all of them.

    Args:
      files: in the source's order.
      more: something else to compare for each file.
    """
    names = [os.fspath(file) for file in files]
    above = len(os.path.commonprefix(names).rpartition("/")[0])
    sizes = storage.concurrently(lambda file: file.stat().length, files)
    return summarize(", ".join([name[above:].lstrip("/"), f"{size:,} bytes", *map(str, rest)])
                     for name, size, *rest in zip(names, sizes, *([more] if more else []), strict=True))


def difference(one: Mapping[str, Any], other: Mapping[str, Any], owners: tuple[str, str]) -> str:
    """The first difference between two summaries, in words; empty if there is none.

    Fields that a summary lacks, such as those of older versions, are not compared.

    Args:
      owners: names for the two sources.
    """
    if "classes" in one and "classes" in other and one["classes"] != other["classes"]:
        return _of_classes((one["classes"], other["classes"]), owners)
    if one.get("sha256", "") == other.get("sha256", "") or not ("sha256" in one and "sha256" in other):
        return ""
    counts = "" if one["count"] == other["count"] else (f"{owners[0]} has {one['count']:,} files and {owners[1]} "
                                                        f"{other['count']:,}; ")
    stride, shorter = max(one["stride"], other["stride"]), min(one["count"], other["count"])
    same = 0  # leading files that are known to be equal
    while same + stride <= shorter and _mark(one, same + stride) == _mark(other, same + stride):
        same += stride
    if stride > 1:
        after = f", {_mark(one, same)[17:]!r}" if same else ""
        return f"{counts}the first difference lies among the {stride:,} files after file {same:,}{after}"
    names = [_mark(summary, same + 1)[17:] if same < summary["count"] else "" for summary in (one, other)]
    if not all(names):
        return f"{counts}only {owners[names.index('') ^ 1]} has {''.join(names)!r}"
    return f"{counts}file {same + 1:,} is {names[0]!r} in {owners[0]} and {names[1]!r} in {owners[1]}"


def _mark(summary: Mapping[str, Any], count: int) -> str:
    """The mark after `count` files; "" if `count` is 0."""
    return summary["marks"][count // summary["stride"] - 1] if count else ""


def _of_classes(names: tuple[Sequence[str], Sequence[str]], owners: tuple[str, str]) -> str:
    """`difference` between two lists of class names."""
    sets = [set(mine) for mine in names]
    lone = [sorted(mine - others) for mine, others in (sets, sets[::-1])]
    if any(lone):
        return " and ".join(f"only {who} has class {mine[0]!r}" for who, mine in zip(owners, lone, strict=True) if mine)
    return f"the order of the classes differs between {owners[0]} and {owners[1]}"
