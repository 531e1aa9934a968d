"""Trains a tiny model on several meshes and compares the runs: python meshes.py CHECK ARGUMENTS.

CHECK is one of the functions below that `main` lists. Needs 8 devices.
"""

import dataclasses
import itertools
import sys
import tempfile

import jax
import numpy as np

from igpt_jax import checkpoint
from igpt_jax.config import MeshConfig, base_config, parse
from igpt_jax.model import image_gpt
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training.steps import abstract_state, init_state, jit_train_step, state_shardings

ALL = [MeshConfig(*sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
FOUR = [MeshConfig(8, 1), MeshConfig(1, 8), MeshConfig(1, 2, 2, 2), MeshConfig(2, 1, 1, 4)]


def setup(mesh_config, devices, precision, accumulate=1, optimizer="", job="pretrain", objective="autoregressive",
          **model):
    """Config, mesh and model of a run."""
    config = base_config(job, f"model=igpt_tiny,steps=20,batch_size=8,precision={precision},objective={objective},"
                              f"accumulate={accumulate},{optimizer}")
    config.model.update({"layers": 2, "embed": 32, "heads": 8, **model})
    config = parse(job, config)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    classes = 4 if job == "finetune" else 0
    return config, mesh, Model.of(config, 16, 8, mesh, classes, precision)


def run(mesh_config, devices, precision, steps=20, **options):
    """Losses and gradient norms [steps, metrics] of a run, and its last state."""
    config, mesh, model = setup(mesh_config, devices, precision, **options)
    shardings = state_shardings(model, config, mesh)
    metrics = ("nats_per_pixel", "gradient_norm", *(["classification_nats"] if model.dims.K else []))
    rows = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: init_state(model, config, key), out_shardings=shardings)(jax.random.key(0))
        step = jit_train_step(model, config, mesh, 5)
        for index in range(steps):
            tokens = (np.random.default_rng(index).integers(0, 4, (8, 64)) + np.arange(64)) % 16
            tokens, labels = jax.device_put((tokens, tokens[:, 0] % 4), sharding.batch_sharding(mesh))
            state, values = step(state, tokens, jax.random.key(1), labels if model.dims.K else None)
            rows.append([float(values[f"train/{name}"]) for name in metrics])
    return np.array(rows), state


def compare(name, tolerance, one, many):
    """Asserts that two runs agree: metrics relative, parameters absolute."""
    error = np.abs(many[0] / one[0] - 1).max()
    weights = max(float(np.abs(np.asarray(a) - np.asarray(b)).max())
                  for a, b in zip(jax.tree.leaves(one[1]["params"]), jax.tree.leaves(many[1]["params"]), strict=True))
    print(name, error, weights, flush=True)
    assert error <= tolerance and weights <= tolerance, (name, error, weights)


def losses(precision, tolerance, first_mesh):
    """The meshes of FOUR from `first_mesh` on against one device."""
    jax.config.update("jax_enable_x64", precision == "float64")
    one = run(MeshConfig(), 1, precision)
    assert one[0][-1, 0] < one[0][0, 0], "the model does not learn"
    for mesh in FOUR[int(first_mesh):]:
        compare(mesh, float(tolerance), one, run(mesh, 8, precision))


def random_views(job, objective):
    """Random views; in finetune also labels, and a class head before the last block."""
    jax.config.update("jax_enable_x64", True)
    tuned = job == "finetune"
    options = {"steps": 10, "job": job, "objective": objective, **({"class_layer": 1} if tuned else {})}
    one = run(MeshConfig(), 1, "float64", **options)
    assert one[0].shape == (10, 2 + tuned) and one[0][-1, 0] < one[0][0, 0]
    compare("fsdp x tensor x context", 1e-8, one, run(MeshConfig(1, 2, 2, 2), 8, "float64", **options))
    compare("data, microbatches", 1e-8, one, run(MeshConfig(2, 1), 2, "float64", accumulate=4, **options))


def stages():
    """The products of TPUs: results row by row, weights gathered and gradients scattered in two stages."""
    jax.config.update("jax_enable_x64", True)
    one, product_for, pairs = run(MeshConfig(), 1, "float64"), image_gpt.product_for, lambda devices: devices <= 2
    image_gpt.product_for = lambda *given: dataclasses.replace(
        product_for(*given), gathers_at_once=pairs, scatters_at_once=pairs, row_major=True, unrolled=9)
    for mesh in (MeshConfig(1, 8), MeshConfig(1, 4, 1, 2)):
        compare(mesh, 1e-8, one, run(mesh, 8, "float64"))


def memory_levers(*levers):
    """Settings of the model or of accumulation, each as `key=value,key=value`, against one device without any."""
    jax.config.update("jax_enable_x64", True)
    one = run(MeshConfig(), 1, "float64")
    for lever in levers:
        settings = {key: int(value) if value.isdigit() else value
                    for key, value in (each.split("=") for each in lever.split(","))}
        compare(lever, 1e-8, one, run(MeshConfig(1, 2, 2, 2), 8, "float64", **settings))


def muon():
    """Muon with a moving average: matrices split over heads, hidden dims or widths are orthogonalized whole."""
    jax.config.update("jax_enable_x64", True)
    options = {"optimizer": "optimizer.name=muon,optimizer.ema=0.9,optimizer.weight_decay=0.1", "steps": 10}
    one = run(MeshConfig(), 1, "float64", **options)
    assert one[0][-1, 0] < one[0][0, 0] - 0.1, "the model does not learn"
    for mesh in FOUR:
        many = run(mesh, 8, "float64", **options)
        compare(mesh, 1e-8, one, many)
        compare(f"{mesh}, average", 1e-8, (one[0], {"params": one[1]["ema"]}), (many[0], {"params": many[1]["ema"]}))


def all_meshes():
    """Every mesh of 8 devices: losses, and the state of one mesh restored into it."""
    jax.config.update("jax_enable_x64", True)
    one = run(MeshConfig(), 1, "float64")
    config, _, _ = setup(MeshConfig(1, 2, 2, 2), 8, "float64")
    record = checkpoint.Metadata(config, np.zeros((16, 3), np.float32), 8, "data", 20)
    with tempfile.TemporaryDirectory() as workdir:
        _, saved = run(MeshConfig(1, 2, 2, 2), 8, "float64")
        with checkpoint.Checkpoints(workdir, config) as checkpoints:
            checkpoints.save(saved, record)
        assert len(ALL) == 20
        for mesh_config in ALL:
            compare(mesh_config, 1e-8, one, run(mesh_config, 8, "float64"))
            _, mesh, model = setup(mesh_config, 8, "float64")
            with checkpoint.Checkpoints(workdir, config) as checkpoints:
                abstract = abstract_state(model, config, mesh)
                restored, _ = checkpoints.restore(lambda _, abstract=abstract: abstract, record)
            for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def bytes_per_device():
    """Parameters and moments take 1/8 of the bytes under meshes without data, and moments lie as their parameters."""
    def bytes_on_a_device(tree):
        return sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree))

    # Factored columns have no embed dim left to split; at this tiny size they still weigh.
    for setting, slack in (("second_moment=float32", 0.05), ("second_moment=bfloat16", 0.05),
                           ("second_moment=factored", 0.3), ("name=muon,optimizer.ema=0.9", 0.05)):
        def state_on(mesh_config, devices, setting=setting):
            config, mesh, model = setup(mesh_config, devices, "float32", optimizer=f"optimizer.{setting}")
            return abstract_state(model, config, mesh)

        replicated = state_on(MeshConfig(), 1)
        for mesh in (MeshConfig(1, 8), MeshConfig(1, 4, 1, 2)):
            sharded = state_on(mesh, 8)
            for name in {"params", "optimizer", "ema"} & set(replicated):
                ratio = bytes_on_a_device(sharded[name]) / bytes_on_a_device(replicated[name])
                assert abs(ratio * 8 - 1) < slack, (setting, name, ratio)
    _, state = run(MeshConfig(2, 2, 2, 1), 8, "float32", 1)
    config, mesh, model = setup(MeshConfig(2, 2, 2, 1), 8, "float32")
    planned = abstract_state(model, config, mesh)
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim), (found, expected)
    adam = state["optimizer"][0]
    for moments in (adam.mu, adam.nu):
        for param, moment in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(moments), strict=True):
            assert param.sharding == moment.sharding and not (param.ndim > 1 and param.sharding.is_fully_replicated)


def main(check, *arguments):
    checks = (losses, random_views, stages, memory_levers, muon, all_meshes, bytes_per_device)
    next(each for each in checks if each.__name__ == check)(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
