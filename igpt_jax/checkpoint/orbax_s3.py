"""Teaches Orbax to keep checkpoints in s3:// paths: Orbax 0.12 knows gs:// only.

Both are buckets: nothing can be renamed, so a step is written in place and `commit_success.txt` says that it is whole.
"""

import os
import re

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from igpt_jax import storage

BUCKETS = ("gs://", "s3://")


def teach() -> None:
    """Makes Orbax treat s3:// as it treats gs://, with TensorStore's driver for it. Again: nothing more."""
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
    # Orbax's own makes `gs://` of each `gs:/`, in a local path with a folder named `imgs:` too.
    tensorstore_utils._normalize_path = lambda path: re.sub("^(gs|s3):/+", r"\1://", os.path.normpath(path))
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(BUCKETS)
