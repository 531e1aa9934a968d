"""Checksums on a mesh of 8 devices: the same in any sharding, and a device with a wrong bit is named."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from igpt_jax.config import MeshConfig
from igpt_jax.parallel import checksums, sharding


def with_one_bit_wrong(x, mesh, spec, device):
    """`x` sharded by `spec`, with one bit of the shard on `device` changed."""
    shards = []
    for shard in jax.device_put(x, NamedSharding(mesh, spec)).addressable_shards:
        data = np.asarray(shard.data).copy()
        if shard.device.id == device:
            data.view(np.uint8).reshape(-1)[5] ^= 4
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, spec), shards)


def main():
    jax.config.update("jax_enable_x64", True)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for dtype in (np.float64, np.float32):
        x = np.random.default_rng(0).standard_normal((4, 8, 6)).astype(dtype)
        one = checksums.of_tree({"x": x})["x"]
        specs = [P(), P("fsdp"), P(None, "tensor"), P("data", "fsdp", "tensor"), P(None, ("data", "fsdp", "tensor"))]
        for spec in specs:
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            assert checksums.of_tree({"x": sharded})["x"] == one, spec

    good = {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, spec in (("a", P()), ("b", P("fsdp")))}
    assert checksums.odd_devices(good, mesh) == {}
    for name, spec, device in (("a", P(), 5), ("b", P("fsdp"), 3)):
        odd = checksums.odd_devices({**good, name: with_one_bit_wrong(x, mesh, spec, device)}, mesh)
        assert list(odd) == [name] and len(odd[name]) == 1 and f"{device} of process 0" in odd[name][0], odd
    two_copies = with_one_bit_wrong(np.zeros((4, 8), np.float32), mesh, P(None, ("fsdp", "tensor")), 3)
    assert len(checksums.odd_devices({"c": two_copies}, mesh)["c"]) == 2


main()
