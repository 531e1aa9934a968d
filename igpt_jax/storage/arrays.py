"""Arrays by name, written as .npz. A module of its own: the command line starts without NumPy."""

import io

import numpy as np

from igpt_jax.storage.files import publish
from igpt_jax.storage.paths import Path


def publish_arrays(path: Path, **arrays: np.typing.ArrayLike) -> None:
    """Writes arrays by name as .npz, atomically."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    publish(path, file.getvalue())
