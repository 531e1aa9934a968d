"""Tables of results, written as JSON and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax.storage import files as storage
from igpt_jax.storage import side_files
from igpt_jax.storage.json import parse_json, to_json
from igpt_jax.storage.paths import Path

Row = Mapping[str, Any]


def publish(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes NAME.json and NAME.csv, each of them atomically.

    Values that are not finite are null in the JSON and empty in the CSV. A value that is itself a table is left out of
    the CSV.
    """
    text = to_json(rows)
    storage.publish(folder / f"{name}.json", text)
    rows = parse_json(text)
    columns = dict.fromkeys(column for row in rows for column, value in row.items() if not _is_table(value))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.publish(folder / f"{name}.csv", lines.getvalue())


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows that `publish` wrote; empty if there is no file yet. A damaged file is set aside, with a log line."""
    rows = side_files.load(folder / f"{name}.json", list) or []
    return [row for row in rows if isinstance(row, dict)]


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value)
