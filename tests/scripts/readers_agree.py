"""Compares both readers on 8 devices, the resident one without TensorFlow: python readers_agree.py STORE."""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from igpt_jax import data
from igpt_jax.data import store
from igpt_jax.data.codecs import Palette
from igpt_jax.data.token_file import tokens_of


def main(path: str) -> None:
    # The batch dim is split over two mesh axes and replicated over the third.
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    opened = store.Store.open(path)
    split, codec = opened.split("train"), Palette(opened.palette)

    def take(reader: str) -> list[data.Batch]:
        batches = data.train_batches(split, codec, reader=reader, seed=2, batch_size=16, start_step=11,
                                     sharding=sharding, prefetch=2)
        with jax.transfer_guard("disallow"):
            taken = [next(batches) for _ in range(4)]
        batches.close()
        return taken

    sys.modules["tensorflow"] = None  # importing it fails
    resident = take("resident")
    del sys.modules["tensorflow"]
    for one, other in zip(resident, take("tfdata"), strict=True):
        assert one.tokens.sharding.is_equivalent_to(sharding, 2) and other.tokens.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.tokens, tokens_of(split, codec, one.ids))


main(sys.argv[1])
