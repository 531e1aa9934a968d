"""Checks what the compiler makes of the training step: python compiled_step.py CHECK. Needs 8 devices.

CHECK is one of the functions below that `main` lists; `on_tpu` needs libtpu and no TPU.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from igpt_jax.config import MeshConfig, base_config, parse
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training.steps import abstract_state, jit_train_step

LAYERS = 7  # no other dim has this size, so that it marks stacked weights
COLORS, TOKENS, EMBED = 64, 64, 128
MESHES = MeshConfig(1, 8), MeshConfig(1, 2, 2, 2)


def lower(mesh_config, devices=None, image_size=8, reduce_dtype="bfloat16", **model):
    """The lowered training step and its abstract state."""
    config = base_config("pretrain", "model=igpt_tiny,batch_size=8,precision=bfloat16")
    config.model.update({"layers": LAYERS, "embed": EMBED, "heads": 8, **model})
    config = parse("pretrain", config)
    mesh = sharding.make_mesh(mesh_config, devices)
    model = Model(config.model, COLORS, image_size, "bfloat16", mesh, reduce_dtype=reduce_dtype)
    with jax.set_mesh(mesh):
        state = abstract_state(model, config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
        tokens = jax.ShapeDtypeStruct((8, model.dims.T), jnp.int32, sharding=sharding.batch_sharding(mesh))
        return jit_train_step(model, config, mesh, 5).lower(state, tokens, key), state


def gathers_of(text, kinds="all-gather|all-gather-start"):
    """The result types of all gathers; none may be of the stacked weights of all layers."""
    gathers = re.findall(rf"= (.*?) (?:{kinds})\(", text)
    stacked = [shape for shape in gathers if re.search(rf"\[{LAYERS},", shape)]
    assert not stacked, stacked
    return gathers


def products():
    """Both sides of every matrix product are bfloat16."""
    for mesh in MESHES:
        operands = re.findall(r"stablehlo.dot_general.* : \((.*)\) ->", lower(mesh)[0].as_text())
        assert len(operands) > 20, operands
        wrong = {pair for pair in operands if pair.count("xbf16>") != 2}
        assert not wrong, wrong


def gathers():
    """Weights are gathered inside the loop, layer by layer; outside of it at most one table is."""
    for mesh in MESHES:
        text = lower(mesh)[0].compile().as_text()
        assert gathers_of(text, "all-gather|all-gather-start|all-to-all"), "no gathers in an fsdp step"
        outside = re.findall(r"= (.*?) all-gather(?:-start)?\(", text[text.index("ENTRY"):])
        shapes = [shape.split(",") for found in outside for shape in re.findall(r"\[([\d,]+)\]", found)]
        sizes = [np.prod([int(n) for n in shape]) for shape in shapes]
        assert max(sizes) <= max(COLORS, TOKENS) * EMBED, outside


def gradients():
    """The gradients of a block's six weights are summed in float32 on request, and none is all-reduced."""
    step, _ = lower(MESHES[0], reduce_dtype="float32")
    operands = re.findall(r'"stablehlo.reduce_scatter".*?\}\) : \(tensor<([^>]*)>', step.as_text(), re.DOTALL)
    assert len(operands) == 6 and all(operand.endswith("f32") for operand in operands), operands
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", step.compile().as_text())
    sizes = [np.prod([int(n) for n in dims.split(",") if n]) for found in sums
             for dims in re.findall(r"\[([\d,]*)\]", found)]
    assert max(sizes) <= max(COLORS, TOKENS) * EMBED, sums


def update_in_place():
    """The new state takes the old one's memory, and little more."""
    for mesh in MESHES:
        step, state = lower(mesh)
        memory = step.compile().memory_analysis()
        size = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(state))
        assert size <= memory.alias_size_in_bytes, (size, memory)
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024, memory


def on_tpu():
    """The TPU compiler, for 8 chips: all of the above, and offloaded attention in the host's memory."""
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    for mesh, remat in ((MeshConfig(1, 8), "attention"), (MeshConfig(1, 2, 2, 2), "offload")):
        step, _ = lower(mesh, devices, image_size=16, remat=remat, embed=256)
        compiled = step.compile()
        gathers = gathers_of(compiled.as_text())
        assert len(gathers) > 10
        wide = [shape for shape in gathers if "f32" in shape]  # the tables in which `embed` looks rows up
        assert all(re.match(r"f32\[(64|256|128),256\]", shape) for shape in wide), wide
        memory = compiled.memory_analysis()
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 8192, memory
        assert (memory.host_temp_size_in_bytes > 0) == (remat == "offload"), memory


def main(check):
    next(each for each in (products, gathers, gradients, update_in_place, on_tpu) if each.__name__ == check)()


if __name__ == "__main__":
    main(*sys.argv[1:])
