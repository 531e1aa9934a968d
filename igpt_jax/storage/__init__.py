"""Files on local disks and in buckets (gs://, s3://). No JAX is imported here.

A bucket has no rename, no append and no locks, and an object appears only when its write is complete. `publish`,
`LineWriter` and `lock` behave the same on both kinds of storage.
"""

from igpt_jax.storage.files import concurrently, publish, read, sweep
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
    unreachable,
)

__all__ = [
    "LOCK", "LineWriter", "Path", "SCHEMES", "absolute", "children", "concurrently", "encoded", "is_local", "listing",
    "lock", "matching", "parse_json", "path", "patterns", "publish", "read", "read_lines", "sweep", "tensorstore_spec",
    "to_json", "unreachable",
]
