"""Verifies a whole pixel store against its checksums."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from igpt_jax.data.store.manifest import check_files, damaged, files_in, hashed


def verify(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Reads all files of a store and compares them with their SHA-256, after `check_files`.

    Raises:
      UserError: names the first file that differs.
    """
    check_files(path, manifest)
    found = hashed(path, manifest["splits"])
    for name, known in files_in(manifest).items():
        if found[name] != known:
            raise damaged(path, name, "differs from its SHA-256")
