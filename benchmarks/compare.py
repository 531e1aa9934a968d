"""Compares two files of figures row by row:  python benchmarks/compare.py BEFORE.json AFTER.json

Reads what `--json` of train_step.py and attention.py writes, and prints seconds before and after, and their ratio.
Exit code 1: a row takes more than --slower times as long (default 1.05). Exit code 2: the files cannot be compared,
because hardware or sizes differ, or no row is in both.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

# All other keys must agree.
MEASURED = {"rows", "failed", "load", "product_flops", "peak_bytes", "peak_mib", "jax", "torch", "queue"}


def rows_by_name(figures: dict[str, Any]) -> dict[str, float]:
    """Seconds by the name of a row, which is all its texts."""
    return {" ".join(value for value in row.values() if isinstance(value, str)): row["seconds"]
            for row in figures["rows"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    parser.add_argument("--slower", type=float, default=1.05, help="largest ratio of seconds that passes")
    arguments = parser.parse_args()
    try:
        before, after = (json.loads(file.read_text()) for file in (arguments.before, arguments.after))
        mine, others = rows_by_name(before), rows_by_name(after)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"compare: {type(error).__name__}: {error}. Give two files written with --json.", file=sys.stderr)
        return 2
    differing = [f"{key}={after.get(key)!r} (before: {before.get(key)!r})" for key in sorted(before | after)
                 if key not in MEASURED and before.get(key) != after.get(key)]
    names = [name for name in mine if name in others]
    if differing or not names:
        print(f"compare: the files measure different things: {'; '.join(differing) or 'no row is in both'}.",
              file=sys.stderr)
        return 2
    width = max(map(len, names))
    slower = 0
    for name in names:
        ratio = others[name] / mine[name]
        slower += ratio > arguments.slower
        print(f"{name:{width}} {mine[name] * 1e3:10.1f} ms {others[name] * 1e3:10.1f} ms {ratio:6.2f}"
              f"{'  SLOWER' if ratio > arguments.slower else ''}")
    for name in sorted(mine.keys() ^ others.keys()):
        print(f"{name:{width}} only {'before' if name in mine else 'after'}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
