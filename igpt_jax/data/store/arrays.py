"""Specs of the zarr 3 arrays that hold a store's pixels and labels."""

from typing import Any

import tensorstore
from etils import epath

from igpt_jax import storage


def array_spec(path: epath.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": storage.tensorstore_spec(path)}


def create_array(path: epath.Path, chunk: list[int], dtype: str, codecs: list[dict]) -> tensorstore.TensorStore:
    metadata = {"shape": [0, *chunk[1:]], "data_type": dtype, "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
    # Chunks of zeros are stored too, so that a missing chunk is an error and not a black image.
    spec = {**array_spec(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, create=True, delete_existing=True).result()
