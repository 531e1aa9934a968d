"""Adds s3:// paths to Orbax, whose version 0.12 supports only gs:// buckets.

In both kinds of bucket nothing can be renamed. Orbax therefore writes a step in place, and `commit_success.txt` marks
it as complete.
"""

import os
import re

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from igpt_jax import storage

BUCKETS = ("gs://", "s3://")


def teach() -> None:
    """Patches Orbax to treat s3:// like gs://, with TensorStore's S3 driver. Calling it again changes nothing."""
    if gcs_utils._GCS_PATH_PREFIX == BUCKETS:
        return
    gcs_spec = gcs_utils.get_kvstore_for_gcs

    def spec(path: str) -> dict:
        if not path.startswith("s3://"):
            return gcs_spec(path)
        found = storage.tensorstore_spec(epath.Path(path))
        return found if path.endswith("/") else {**found, "path": found["path"].removesuffix("/")}

    gcs_utils._GCS_PATH_PREFIX = BUCKETS
    gcs_utils.get_kvstore_for_gcs = spec
    # Orbax replaces every `gs:/` with `gs://`, which breaks a local path with a folder such as `imgs:`.
    tensorstore_utils._normalize_path = lambda path: re.sub("^(gs|s3):/+", r"\1://", os.path.normpath(path))
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(BUCKETS)
