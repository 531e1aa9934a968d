"""Fits an attention-pooled probe on several meshes and at several batch sizes, in float64. Needs 8 devices."""

import jax
import numpy as np

from igpt_jax.config import MeshConfig, ModelConfig
from igpt_jax.data.token_file import Tokens
from igpt_jax.evaluation import attention_probe
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding

jax.config.update("jax_enable_x64", True)
random = np.random.default_rng(0)
tokens = Tokens(random.integers(0, 16, (60, 16)))
labels = tokens.tokens(np.arange(60))[:, 3] % 4


def fitted(mesh_config, devices, batch_size):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    model = Model(ModelConfig("igpt_tiny", layers=2, embed=32, heads=4), 16, 4, "float64", mesh)
    shardings = sharding.parameter_shardings(model.abstract_parameters(), mesh)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    frozen = attention_probe.Frozen(model, params, mesh, 1, "normalized", batch_size, None, 0)
    probes = attention_probe.fit(frozen, tokens, labels, 4, (1e-2, 1e-3), 8)
    return probes.weights, probes.predict(frozen, tokens)


attention_probe.BATCH = 48
one = fitted(MeshConfig(), 1, 60)
for given in ((MeshConfig(), 1, 20), (MeshConfig(1, 2, 2, 2), 8, 10), (MeshConfig(2, 1, 1, 4), 8, 64)):
    weights, classes = fitted(*given)
    for name, array in weights.items():
        error = np.abs(array - one[0][name]).max()
        print(given, name, error, flush=True)
        assert array.dtype == np.float64 and error < 1e-8, (given, name, error)
    np.testing.assert_array_equal(classes, one[1])
