"""Opens and creates the zarr 3 arrays of a store's images and labels."""

from typing import Any

import tensorstore
from etils import epath

from igpt_jax import storage


def array_spec(path: epath.Path) -> dict[str, Any]:
    """TensorStore's spec of the array in a folder."""
    return {"driver": "zarr3", "kvstore": storage.tensorstore_spec(path)}


def create_array(path: epath.Path, chunk: list[int], dtype: str, codecs: list[dict]) -> tensorstore.TensorStore:
    """Creates an empty array, in place of any that is there.

    Args:
      path: the array's folder.
      chunk: shape of a zarr chunk (a shard, if the codecs divide it); all dims but the first are the array's own.
      dtype: zarr's name of the dtype.
      codecs: zarr's codecs, as JSON.
    """
    metadata = {"shape": [0, *chunk[1:]], "data_type": dtype, "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
    # Chunks of zeros are stored too. A missing chunk is then an error and not a black image.
    spec = {**array_spec(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, delete_existing=True).result()
