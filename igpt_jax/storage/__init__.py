"""Paths of users, local or in a bucket (gs://, s3://), and the things that differ there. No JAX is imported here.

A bucket has no rename, no append and no locks: an object appears whole when its write ends. `publish`, `LineWriter`
and `lock` give both kinds of storage the same meaning.
"""

from igpt_jax.storage.files import publish, read, sweep
from igpt_jax.storage.json import parse_json, to_json
from igpt_jax.storage.lines import LineWriter, read_lines
from igpt_jax.storage.locks import LOCK, lock
from igpt_jax.storage.paths import (
    SCHEMES,
    Path,
    absolute,
    children,
    encoded,
    is_local,
    listing,
    matching,
    path,
    patterns,
    tensorstore_spec,
)

__all__ = [
    "LOCK", "LineWriter", "Path", "SCHEMES", "absolute", "children", "encoded", "is_local", "listing", "lock",
    "matching", "parse_json", "path", "patterns", "publish", "read", "read_lines", "sweep", "tensorstore_spec",
    "to_json",
]
