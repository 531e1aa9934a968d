"""Rows of results, as JSON for programs and as CSV for people."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax import runtime, storage

Row = Mapping[str, Any]


def publish(folder: storage.epath.Path, name: str, rows: Sequence[Row]) -> None:
    """Writes NAME.json and NAME.csv, each of them whole or not at all. Tables within a row are in the JSON alone."""
    storage.publish(folder / f"{name}.json", runtime.to_json(rows))
    columns = dict.fromkeys(column for row in rows for column, value in row.items() if not _is_table(value))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.publish(folder / f"{name}.csv", text.getvalue())


def load(folder: storage.epath.Path, name: str) -> list[dict[str, Any]]:
    """The rows that `publish` wrote; none where there are none yet."""
    file = folder / f"{name}.json"
    return json.loads(storage.read(file)) if file.exists() else []


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value)
