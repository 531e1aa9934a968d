"""A checksum changes with any bit, is the same on any mesh, and names the device whose copy differs."""

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
def test_host_checksums_equal_device_checksums(dtype):
    """Arrays that are read in no, one and several pieces. Seen to fail with indices counted from each piece's start."""
    rng = np.random.default_rng(0)
    for shape in ((), (0,), (3, 0), (5,), (7, 5, 3), (3, 700, 900)):
        x = np.asarray(jnp.asarray(64 * rng.standard_normal(shape), dtype))
        assert checksums.of_host_array(x) == int(checksums.of_array(jnp.asarray(x))), shape


def test_moved_content_changes_the_checksum_and_one_is_golden():
    """Transposed, reversed and reshaped arrays differ. The golden checksum keeps old checkpoints readable.

    Seen to fail with all weights 1, and without mixing between dims: (2 i + 1)(2 j + 1) is the same for (i, j) and
    (j, i), so that a transposed array looks the same.
    """
    square = jnp.arange(16, dtype=jnp.float32).reshape(4, 4)
    moved = (square, square.T, square[::-1], square[:, ::-1], square.reshape(2, 8))
    assert len({int(checksums.of_array(x)) for x in moved}) == 5
    assert int(checksums.of_array(square)) == 2190152789
    assert checksums.of_tree({"b": {"c_D": jnp.float32(1)}, "a": (jnp.int32(0), jnp.zeros((0,)))}).keys() == {
        "a/0", "a/1", "b/c_D"}


def test_checksums_are_the_same_on_any_mesh_and_name_the_odd_device(python):
    """1 device against 2 x 2 x 2 in 5 shardings, float64 too. Then one device's copy of a replicated array, and one
    copy of a shard, get one wrong bit.

    Seen to fail with the shards of an array compared with each other.
    """
    python("checksums.py")
