"""Compiles a training step with each attention back-end of this platform on two devices, sequences whole and split."""

import jax

from igpt_jax.config import base_config, parse
from igpt_jax.parallel import sharding
from igpt_jax.planner import compilation

SPLIT = "mesh.fsdp=1,mesh.context=2"
for backend, more in (("reference", "mesh.fsdp=2"), ("blocked", "mesh.fsdp=2"), ("blocked", SPLIT),
                      ("blocked", SPLIT + ",objective=masked")):
    config = parse("plan", base_config("plan", "model=igpt_tiny,model.layers=1,model.embed=32,image_size=8,"
                                               f"batch_size=2,palette_size=16,model.attention={backend},{more}"))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step, shapes, _ = compilation.step_for(config, mesh)
        step.lower(*shapes).compile({"xla_backend_optimization_level": 0})
