"""Compares completions on fsdp, tensor and context axes with those of one device. Needs 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.config import MeshConfig, ModelConfig
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate
from igpt_jax.parallel import sharding


def completions(mesh_config, devices, given, temperature):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    model = Model(ModelConfig("igpt_tiny", layers=2, embed=32, heads=2), 13, 8, "float32", mesh)
    params = model.init(jax.random.key(0))
    params["head_VD"] = jax.random.normal(jax.random.key(1), (13, 32))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        keys = jax.vmap(jax.random.key)(jnp.arange(4))
        given_BP = np.random.default_rng(0).integers(0, 13, (4, given)).astype(np.int32)
        return np.asarray(jax.jit(generate, static_argnums=(0, 4))(
            model, params, given_BP, keys, Sampling(temperature)))


for given, temperature in ((0, 1.0), (7, 0.0), (40, 1.0)):
    np.testing.assert_array_equal(completions(MeshConfig(1, 2, 2, 2), 8, given, temperature),
                                  completions(MeshConfig(), 1, given, temperature))
