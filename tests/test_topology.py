"""Names of topologies, and the shapes, chips and bandwidths behind them."""

import pytest

from igpt_jax.config import UserError
from igpt_jax.parallel import topology


@pytest.mark.parametrize("name, chip, devices, groups", [
    ("v5e:16x16", "TPU v5e", 256, 1), ("v5e:16x16*4", "TPU v5e", 1024, 4), ("v5p:4x4x8", "TPU v5p", 128, 1),
    ("h100:8", "H100 SXM", 8, 1), ("h200:8x4", "H200 SXM", 32, 4), ("cpu:8", "CPU", 8, 1)])
def test_names(name, chip, devices, groups):
    """Seen to fail with slices left out of the product."""
    target = topology.parse(name)
    assert (target.chip.name, target.devices, target.groups) == (chip, devices, groups)


@pytest.mark.parametrize("name, message", [
    ("v5:16x16", "Did you mean 'v5e:16x16'?"), ("tpu", "Kinds: v4, v5e"), ("v5e:16", "a slice of v5e has 2 dims"),
    ("v5p:4x4", "a slice of v5p has 3 dims"), ("v5e:0x4", "a slice of v5e"), ("h100:0", "h100:8x4 for 4 nodes"),
    ("cpu:8x2", "cpu:8."), ("v5e:4x4*0", "*4 after them for 4 slices"), ("", "Kinds")])
def test_mistakes_name_the_choices(name, message):
    """Seen to fail with `parse` passing unknown names on to the compiler."""
    with pytest.raises(UserError) as error:
        topology.parse(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_resized_targets_are_as_square_as_possible():
    """Seen to fail with the largest side first, and with the first of the shapes that have the same smallest side."""
    for name, devices, larger in (("v5e:4x4", 32, "v5e:4x8"), ("v5p:2x2x1", 128, "v5p:4x4x8"),
                                  ("h100:8", 32, "h100:8x4"), ("v5p:4x4x4", 4, "v5p:2x2x1"),
                                  ("v5p:4x4x4", 256, "v5p:4x8x8"), ("v4:4x4x4", 32, "v4:2x4x4"),
                                  ("v5e:16x16", 512, "v5e:16x16*2"),
                                  ("v5e:4x4*2", 64, "v5e:4x4*4"), ("v5e:4x4*2", 8, "v5e:2x4")):
        assert topology.resized(topology.parse(name), devices).name == larger
    assert topology.resized(topology.parse("v5e:4x4"), 12) is None
    assert topology.like("TPU v5 lite", 8).name == "v5e:2x4"
    assert topology.like("NVIDIA H200", 8).chip is topology.chip_for("NVIDIA H200")
    small = topology.chip_for("NVIDIA A100-SXM4-40GB")
    assert topology.resized(topology.like("NVIDIA A100-SXM4-40GB", 8), 16).chip is small
    with pytest.raises(UserError, match="12 devices of kind .* are not whole nodes of 8"):
        topology.like("NVIDIA H200", 12)
    with pytest.raises(UserError, match="Add a row to CHIPS"):
        topology.like("NVIDIA T4", 1)


def test_the_slowest_link_decides():
    """Between slices or nodes the network; within them the links.

    Seen to fail with the span of an axis taken to be its own size, and with groups over the end of a node overlooked.
    """
    slices = topology.parse("v5e:4x4*2")
    mesh = {"data": 2, "fsdp": 16, "tensor": 1, "context": 1}
    assert topology.bandwidth(slices, mesh, ("data",)) == slices.chip.network_bandwidth
    assert topology.bandwidth(slices, mesh, ("fsdp",)) == slices.chip.link_bandwidth
    nodes = topology.parse("h100:8x4")
    mesh = {"data": 1, "fsdp": 16, "tensor": 2, "context": 1}
    assert topology.bandwidth(nodes, mesh, ("fsdp",)) == nodes.chip.network_bandwidth
    assert topology.bandwidth(nodes, mesh, ("tensor",)) == nodes.chip.link_bandwidth
    mesh = {"data": 4, "fsdp": 6, "tensor": 1, "context": 1}  # devices 6 to 11 are in two nodes
    assert topology.bandwidth(topology.parse("h100:8x3"), mesh, ("fsdp",)) == nodes.chip.network_bandwidth


@pytest.mark.parametrize("name, axis, size, rings", [
    ("v5e:16x16", "fsdp", 256, 2), ("v5e:16x16", "fsdp", 64, 1.5), ("v5e:16x16", "tensor", 4, 0.5),
    ("v6e:8x16", "fsdp", 128, 1.5), ("v5e:8x8", "fsdp", 64, 1), ("v5e:2x4", "fsdp", 8, 1),
    ("v4:4x4x4", "fsdp", 64, 3), ("v4:2x4x4", "fsdp", 32, 1.5), ("v4:4x4x8", "fsdp", 64, 2.5),
    ("v4:4x4x8", "tensor", 2, 0.5), ("v5p:4x4x8", "tensor", 16, 2), ("v5p:2x2x1", "fsdp", 4, 1)])
def test_rings_and_lines(name, axis, size, rings):
    """v5e and v6e have rings along sides of 16, v4 and v5p where all sides are multiples of 4; a line is half a ring.

    64 chips of 16x16 are a whole side and a quarter of the other. 64 of 4x4x8 beside tensor=2 are two whole sides and a
    half. 16 of 4x4x8 are the two sides of 4.

    Seen to fail with each side taken for a ring, and with a part of a ring taken for a ring.
    """
    target = topology.parse(name)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, axis: size}
    assert topology.bandwidth(target, mesh, (axis,)) == rings * target.chip.link_bandwidth
