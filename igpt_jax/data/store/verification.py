"""Verification of a whole pixel store against its checksums."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from igpt_jax.config import UserError
from igpt_jax.data.store.manifest import check_files, files_in, hashed


def verify(path: epath.Path, manifest: Mapping[str, Any]) -> None:
    """`check_files`, and reads all files and holds them against their SHA-256.

    Raises:
      UserError: names the first file that differs.
    """
    check_files(path, manifest)
    found = hashed(path, manifest["splits"])
    for name, known in files_in(manifest).items():
        if found[name] != known:
            raise UserError(f"pixel store {path}: {name} differs from its SHA-256. Restore the store from a copy, or "
                            "prepare it again.")
