"""Prints the planned bytes of a training step, and what it adds to this process's resident memory."""

import pathlib
import re

import jax
import numpy as np

from igpt_jax.config import base_config, parse
from igpt_jax.parallel import sharding
from igpt_jax.planner import compilation
from igpt_jax.training.steps import init_state

SETTINGS = "model=igpt_10m,batch_size=8,image_size=16,topology=cpu:1,model.remat=none,precision=float32"


def resident(name):
    """VmRSS (now) or VmHWM (the peak), in bytes."""
    return 1024 * int(re.search(name + r":\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def main():
    config = parse("plan", base_config("plan", SETTINGS))
    planned = compilation.compile_step(config).required_bytes
    mesh = sharding.make_mesh(config.mesh)
    step, shapes, model = compilation.step_for(config, mesh)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        compiled = step.lower(*shapes).compile()
        init = jax.jit(lambda key: init_state(model, config, key)).lower(key).compile()
        tokens = jax.device_put(np.zeros(shapes[1].shape, np.int32), shapes[1].sharding)
        before = resident("VmRSS")
        state = init(key)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which compiling has raised
        jax.block_until_ready(compiled(state, tokens, key))
    print(planned, resident("VmHWM") - before)


if __name__ == "__main__":
    main()
