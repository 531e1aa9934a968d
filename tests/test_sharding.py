"""Every mesh computes the same run, and the state is split as the rules say."""

import logging

import jax
import pytest

from igpt_jax.config import MeshConfig, ModelConfig, UserError
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding

RUN = """
import tempfile, itertools, jax, jax.numpy as jnp, numpy as np
from igpt_jax import checkpoint
from igpt_jax.parallel import sharding
from igpt_jax.training.steps import abstract_state, init_state, jit_train_step, state_shardings
from igpt_jax.config import MeshConfig, base_config, parse
from igpt_jax.model.image_gpt import Model

def parts(mesh_config, devices, precision, accumulate=1, second_moment="float32", job="pretrain",
          objective="autoregressive", **model):
    config = base_config(job, f"model=igpt_tiny,steps=20,batch_size=8,precision={precision},objective={objective},"
                              f"accumulate={accumulate},optimizer.second_moment={second_moment}")
    config.model.update({"layers": 2, "embed": 32, "heads": 8, **model})
    config = parse(job, config)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    classes = 4 if job == "finetune" else 0
    return config, mesh, Model.of(config, 16, 8, mesh, classes, precision)

def run(mesh_config, devices, precision, steps_run=20, **options):
    config, mesh, model = parts(mesh_config, devices, precision, **options)
    places = state_shardings(model, config, mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: init_state(model, config, key), out_shardings=places)(jax.random.key(0))
        step = jit_train_step(model, config, mesh, 5)
        for index in range(steps_run):
            tokens = (np.random.default_rng(index).integers(0, 4, (8, 64)) + np.arange(64)) % 16
            tokens, labels = jax.device_put((tokens, tokens[:, 0] % 4), sharding.batch_sharding(mesh))
            state, metrics = step(state, tokens, jax.random.key(1), labels if model.dims.K else None)
            losses.append([float(metrics[f"train/{name}"]) for name in
                           ("nats_per_pixel", "gradient_norm", *(["classification_nats"] if model.dims.K else []))])
    return np.array(losses), state

def check(name, tolerance, one, many):
    error = np.abs(many[0] / one[0] - 1).max()
    weights = max(float(np.abs(np.asarray(a) - np.asarray(b)).max())
                  for a, b in zip(jax.tree.leaves(one[1]["params"]), jax.tree.leaves(many[1]["params"]), strict=True))
    print(name, error, weights, flush=True)
    assert error <= tolerance and weights <= tolerance, (name, error, weights)

ALL = [MeshConfig(*sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
SOME = [MeshConfig(8, 1), MeshConfig(1, 8), MeshConfig(1, 2, 2, 2), MeshConfig(2, 1, 1, 4)]
"""


@pytest.mark.parametrize(("precision", "tolerance", "meshes"),
                         [("float64", 1e-8, "SOME"), ("float32", 1e-4, "SOME[2:]")])
def test_meshes_give_the_losses_of_one_device(python, precision, tolerance, meshes):
    """20 steps of loss and gradient norm and the weights after them, on 1 and on 8 devices, relative.

    Seen to fail with the values of another sequence attended to wherever the tensor axis is used, and with the second
    halves of sequences not traded back.
    """
    python(RUN + f"""
jax.config.update("jax_enable_x64", {precision == "float64"})
one = run(MeshConfig(), 1, "{precision}")
assert one[0][-1, 0] < one[0][0, 0]
for mesh in {meshes}:
    check(mesh, {tolerance}, one, run(mesh, 8, "{precision}"))
""")


def test_masked_fine_tuning_is_the_same_on_any_mesh(python):
    """Both losses, the gradient norm and the weights, with masks, labels and a class head before the last block, in
    parts and with sequences split: float64, 10 steps. (test_objectives proves the masks on one device.)"""
    python(RUN + """
jax.config.update("jax_enable_x64", True)
options = {"steps_run": 10, "job": "finetune", "objective": "masked", "class_layer": 1}
one = run(MeshConfig(), 1, "float64", **options)
assert one[0].shape == (10, 3) and one[0][-1, 0] < one[0][0, 0]
check("fsdp x tensor x context", 1e-8, one, run(MeshConfig(1, 2, 2, 2), 8, "float64", **options))
check("data, parts", 1e-8, one, run(MeshConfig(2, 1), 2, "float64", accumulate=4, **options))
""")


def test_memory_levers_give_the_same_losses(python):
    """Remat policies, no loop over blocks, accumulation and a state restored into another mesh, float64, 20 steps.

    Seen to fail with the parts of an accumulated batch summed and not averaged.
    """
    python(RUN + """
jax.config.update("jax_enable_x64", True)
mesh = MeshConfig(1, 2, 2, 2)
one = run(MeshConfig(), 1, "float64")
for remat in ("none", "dots", "offload", "full"):
    check(remat, 1e-8, one, run(mesh, 8, "float64", remat=remat))
check("no loop", 1e-8, one, run(mesh, 8, "float64", remat="dots", unroll=2))
for accumulate in (2, 4):
    check(accumulate, 1e-8, one, run(mesh, 8, "float64", accumulate=accumulate))
""")


@pytest.mark.slow
def test_all_twenty_meshes_of_eight_devices(python):
    """As above for every way to write 8 as data x fsdp x tensor x context, and the state of one restored, bit for bit,
    into each of them."""
    python(RUN + """
jax.config.update("jax_enable_x64", True)
one = run(MeshConfig(), 1, "float64")
config, mesh, model = parts(MeshConfig(1, 2, 2, 2), 8, "float64")
record = checkpoint.Metadata(config, np.zeros((16, 3), np.float32), 8, "data", 20)
with tempfile.TemporaryDirectory() as workdir:
    _, saved = run(MeshConfig(1, 2, 2, 2), 8, "float64")
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(saved, record)
    assert len(ALL) == 20
    for mesh_config in ALL:
        check(mesh_config, 1e-8, one, run(mesh_config, 8, "float64"))
        _, mesh, model = parts(mesh_config, 8, "float64")
        with checkpoint.Checkpoints(workdir, config) as checkpoints:
            restored, _ = checkpoints.restore(abstract_state(model, config, mesh), record)
        for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
""")


def test_moments_are_split_like_their_parameters(python):
    """Bytes per device of parameters and moments fall to 1/8 within 5 % under fsdp=8, and in any mesh without data.

    Seen to fail without the optimizer's out_shardings.
    """
    python(RUN + """
def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
# Factored columns have no embed dim left to split; at this tiny size they still weigh.
for steps_run, second_moment, slack in ((1, "float32", 0.05), (0, "bfloat16", 0.05), (0, "factored", 0.3)):
    _, whole = run(MeshConfig(), 1, "float32", steps_run, second_moment=second_moment)
    for mesh in (MeshConfig(1, 8), MeshConfig(1, 4, 1, 2)):
        _, split = run(mesh, 8, "float32", steps_run, second_moment=second_moment)
        for part in ("params", "optimizer"):
            ratio = bytes_on_a_device(split[part]) / bytes_on_a_device(whole[part])
            assert abs(ratio * 8 - 1) < slack, (second_moment, part, ratio)
_, state = run(MeshConfig(2, 2, 2, 1), 8, "float32", 1)
adam = state["optimizer"][0]
for moments in (adam.mu, adam.nu):
    for param, moment in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(moments), strict=True):
        assert param.sharding == moment.sharding and not (param.ndim > 1 and param.sharding.is_fully_replicated)
""")


def test_what_cannot_be_split_is_refused_or_named(caplog):
    """Seen to fail with the warning removed."""
    with pytest.raises(UserError, match="does not multiply to the 8 devices"):
        MeshConfig(data=3, fsdp=1).resolve(8)
    assert MeshConfig(data=2).resolve(8) == MeshConfig(data=2, fsdp=4, tensor=1)

    def mesh_of(**sizes):
        return type("Mesh", (), {"shape": {axis: sizes.get(axis, 1) for axis in sharding.AXES}})

    with pytest.raises(UserError, match=r"does not divide over mesh.tensor=2. Choose mesh\.tensor=1"):
        sharding.check_model(3, 64, mesh_of(tensor=2))
    with pytest.raises(UserError, match=r"64 tokens do not divide over mesh.context=5 .* Choose mesh.context=4"):
        sharding.check_model(2, 64, mesh_of(context=5))
    with pytest.raises(UserError, match="such as 8"):
        sharding.check_batch(7, mesh_of(data=2, fsdp=2))
    with pytest.raises(UserError, match="4 devices x accumulate=3.* such as 12"):
        sharding.check_batch(8, mesh_of(data=2, fsdp=2), accumulate=3)
    with caplog.at_level(logging.WARNING):
        assert tuple(sharding.parameter_spec("start_D", (24,), mesh_of(fsdp=7))) == (None,)
    assert "start_D: its dim D of 24 does not divide over fsdp x context of 7 devices" in caplog.text
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
