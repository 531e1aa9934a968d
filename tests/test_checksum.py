"""One changed bit shows, on any mesh and in any dtype; and the device whose copy is odd is named."""

import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax.parallel import checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "uint16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_bit_changes_the_checksum(dtype):
    """Every bit of 24 random elements, one at a time, in arrays whose low bits are otherwise zero.

    Seen to fail with even weights (2 i).
    """
    numbers = np.random.default_rng(0).integers(0, 2, (4, 3, 2)) * (1 if dtype == "bool" else 64)
    array = np.asarray(jnp.asarray(numbers, dtype))
    expected = int(checksums.of_array(jnp.asarray(array)))
    bits = 1 if dtype == "bool" else 8 * array.dtype.itemsize
    for element in range(array.size):
        for bit in range(bits):
            bytes_ = np.frombuffer(array.tobytes(), np.uint8).copy()
            bytes_[element * array.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            flipped = np.frombuffer(bytes_.tobytes(), array.dtype).reshape(array.shape)
            assert int(checksums.of_array(jnp.asarray(flipped))) != expected, (element, bit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_finds_the_same(dtype):
    """Arrays of none, one and several parts. Seen to fail with the place
    counted from each part's start."""
    rng = np.random.default_rng(0)
    for shape in ((), (0,), (3, 0), (5,), (7, 5, 3), (3, 700, 900)):
        x = np.asarray(jnp.asarray(64 * rng.standard_normal(shape), dtype))
        assert checksums.of_host_array(x) == int(checksums.of_array(jnp.asarray(x))), shape


def test_places_count_and_the_figure_is_golden():
    """Moved, transposed and reversed content shows. The golden figure keeps old checkpoints readable.

    Seen to fail with all weights 1, and without mixing between dims: (2 i + 1)(2 j + 1) is the same for (i, j) and
    (j, i), so that a transposed array looks the same.
    """
    square = jnp.arange(16, dtype=jnp.float32).reshape(4, 4)
    moved = (square, square.T, square[::-1], square[:, ::-1], square.reshape(2, 8))
    assert len({int(checksums.of_array(x)) for x in moved}) == 5
    assert int(checksums.of_array(square)) == 2190152789
    assert checksums.of_tree({"b": {"c_D": jnp.float32(1)}, "a": (jnp.int32(0), jnp.zeros((0,)))}).keys() == {
        "a/0", "a/1", "b/c_D"}


def test_the_figure_is_the_same_on_any_mesh_and_names_the_odd_device(python):
    """1 device against 2 x 2 x 2, in 6 layouts, float64 too. Then one device's copy of a replicated array, and one
    copy of a shard, get one bit wrong.

    Seen to fail with copies of all places of an array compared with each other.
    """
    python("""
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import NamedSharding, PartitionSpec as P
from igpt_jax.parallel import checksums, sharding
from igpt_jax.config import MeshConfig
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
for dtype in (np.float32, np.float64):
    x = np.random.default_rng(0).standard_normal((4, 8, 6)).astype(dtype)
    one = checksums.of_tree({"x": x})["x"]
    specs = [P(), P("fsdp"), P(None, "tensor"), P("data", "fsdp", "tensor"), P(None, ("data", "fsdp", "tensor"))]
    for spec in specs:
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert checksums.of_tree({"x": placed})["x"] == one, spec

def with_one_bit_wrong(x, spec, device):
    place = NamedSharding(mesh, spec)
    parts = []
    for shard in jax.device_put(x, place).addressable_shards:
        data = np.asarray(shard.data).copy()
        if shard.device.id == device:
            data.view(np.uint8).reshape(-1)[5] ^= 4
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, place, parts)

x = x.astype(np.float32)
good = {"a": jax.device_put(x, NamedSharding(mesh, P())), "b": jax.device_put(x, NamedSharding(mesh, P("fsdp")))}
assert checksums.odd_devices(good, mesh) == {}
for name, spec, device in (("a", P(), 5), ("b", P("fsdp"), 3)):
    bad = {**good, name: with_one_bit_wrong(x, spec, device)}
    odd = checksums.odd_devices(bad, mesh)
    assert list(odd) == [name] and len(odd[name]) == 1 and f"{device} of process 0" in odd[name][0], odd
two = with_one_bit_wrong(np.zeros((4, 8), np.float32), P(None, ("fsdp", "tensor")), 3)  # 2 copies of each part
assert len(checksums.odd_devices({"c": two}, mesh)["c"]) == 2
""")
