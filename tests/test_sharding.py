"""Every mesh computes the same run, and the state is sharded as the rules say. The runs are in scripts/meshes.py."""

import logging

import jax
import pytest

from igpt_jax.config import MeshConfig, ModelConfig, UserError
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding


@pytest.mark.parametrize(("precision", "tolerance", "first_mesh"), [
    ("float64", 1e-8, 0), pytest.param("float32", 1e-4, 2, marks=pytest.mark.slow)])
def test_meshes_give_the_losses_of_one_device(python, precision, tolerance, first_mesh):
    """20 steps of loss and gradient norm and the weights after them, on 1 and on 8 devices, relative.

    Seen to fail with the values of another sequence attended to wherever the tensor axis is used, and with the second
    halves of sequences not traded back.
    """
    python("meshes.py", "losses", precision, tolerance, first_mesh)


@pytest.mark.parametrize(("job", "objective"), [
    ("finetune", "masked"), ("pretrain", "diffusion"), pytest.param("finetune", "denoising", marks=pytest.mark.slow)])
def test_random_views_are_the_same_on_any_mesh(python, job, objective):
    """The losses, the gradient norm and the weights, with random views and, in finetune, with labels and a class head
    before the last block, in microbatches and with sequences split: float64, 10 steps. (test_objectives proves the
    views on one device.)

    Seen to fail with another key for the views of each number of microbatches.
    """
    python("meshes.py", "random_views", job, objective)


def test_gathers_and_scatters_in_two_stages(python):
    """float64, 20 steps, over 8 devices and over 4 x 2. Seen to fail with the stages of the scatter exchanged."""
    python("meshes.py", "stages")


@pytest.mark.parametrize("levers", [
    "remat=offload unroll=2,remat=dots accumulate=4",
    pytest.param("remat=none remat=dots remat=full accumulate=2", marks=pytest.mark.slow)])
def test_memory_levers_give_the_same_losses(python, levers):
    """Remat policies, no loop over blocks and gradient accumulation, float64, 20 steps.

    Seen to fail with the gradients of microbatches summed and not averaged.
    """
    python("meshes.py", "memory_levers", *levers.split())


@pytest.mark.slow
def test_muon_is_the_same_on_any_mesh(python):
    """10 steps in float64: losses, weights and their moving average, on 1 and on 8 devices."""
    python("meshes.py", "muon")


@pytest.mark.slow
def test_all_twenty_meshes_of_eight_devices(python):
    """As above for every way to write 8 as data x fsdp x tensor x context. The state of one mesh is also restored, bit
    for bit, into each of them."""
    python("meshes.py", "all_meshes")


def test_moments_are_sharded_like_their_parameters(python):
    """Bytes per device of parameters and moments fall to 1/8 within 5 % under fsdp=8, and in any mesh without data.

    Seen to fail with the moments left out of `state_shardings`, and with a step that replicates its state.
    """
    python("meshes.py", "bytes_per_device")


def test_impossible_meshes_are_refused_and_replicated_dims_named(caplog):
    """Seen to fail with the warning removed."""
    with pytest.raises(UserError, match="does not multiply to the 8 devices"):
        MeshConfig(data=3, fsdp=1).resolve(8)
    assert MeshConfig(data=2).resolve(8) == MeshConfig(data=2, fsdp=4, tensor=1)

    def mesh_of(**sizes):
        return type("Mesh", (), {"shape": {axis: sizes.get(axis, 1) for axis in sharding.AXES}})

    with pytest.raises(UserError, match=r"does not divide over mesh.tensor=2. Choose mesh\.tensor=1"):
        sharding.check_model(3, 64, mesh_of(tensor=2))
    with pytest.raises(UserError, match=r"64 tokens do not divide into .* of mesh.context=5. Choose mesh.context=4"):
        sharding.check_model(2, 64, mesh_of(context=5))
    with pytest.raises(UserError, match="such as 8"):
        sharding.check_batch(7, mesh_of(data=2, fsdp=2))
    with pytest.raises(UserError, match="4 devices x accumulate=3.* such as 12"):
        sharding.check_batch(8, mesh_of(data=2, fsdp=2), accumulate=3)
    with caplog.at_level(logging.WARNING):
        assert tuple(sharding.parameter_spec("start_D", (24,), mesh_of(fsdp=7))) == (None,)
    assert "start_D: its dim D of 24 does not divide over fsdp x context of 7 devices and is replicated" in caplog.text
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = Model(ModelConfig("igpt_tiny"), 512, 16, "float32")
    table = sharding.table(model.abstract_parameters(), mesh)
    assert "blocks/query_DNH" in table and table.endswith(f" {4 * model.dims.parameter_count:,}")


def test_slices_are_joined_along_data():
    """Two TPU slices of 4: devices that share a tensor or context group lie in one slice; fsdp alone may span them.

    Seen to fail with the plain mesh, which knows no slices.
    """
    class Device:
        platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

        def __init__(self, index):
            self.id, self.slice_index = index, index % 2  # interleaved, as no plain reshape would guess
            self.coords, self.core_on_chip = (index // 2 % 2, index // 4, 0), 0

    devices = [Device(index) for index in range(8)]
    for config in (MeshConfig(2, 1, 2, 2), MeshConfig(2, 2, 2, 1), MeshConfig(1, 2, 2, 2)):
        mesh = sharding.make_mesh(config, devices)
        slices = [{device.slice_index for device in group.flat} for group in mesh.devices.reshape(2, 4)]
        assert slices in ([{0}, {1}], [{1}, {0}]), config
    with pytest.raises(UserError, match="does not split over 2 slices"):
        sharding.make_mesh(MeshConfig(1, 1, 8, 1), devices)
