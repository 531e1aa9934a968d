"""Compares attention on several meshes with the reference: python attention_on_devices.py CHECK.

CHECK is one of the functions below that `main` lists. Needs 8 devices.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax.config import MeshConfig
from igpt_jax.model.attention import attention, splash
from igpt_jax.model.attention.reference import reference
from igpt_jax.parallel import sharding


def compare(run, mesh_config, B, T, N, H, dtype, causal, tolerance):
    """Values and gradients against the reference in float32 on the same inputs, on one device."""
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (B, T, N, H)).astype(dtype) for i in range(4))

    def loss(attend):
        def f(q, k, v):
            out = attend(q * H ** -0.5, k, v)
            return (out.astype(jnp.float32) * weight).sum(), out
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))

    plain = loss(lambda *qkv: reference(*(x.astype(jnp.float32) for x in qkv), causal=causal))
    (_, expected), gradients = plain(q, k, v)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:np.prod([*vars(mesh_config).values()])])
    with jax.set_mesh(mesh):
        (_, out), found = loss(run)(q, k, v)
    assert out.dtype == dtype
    for one, other in zip((out, *found), (expected, *gradients), strict=True):
        error = float(jnp.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max())
        assert error <= tolerance, (mesh_config, T, H, dtype, error)


def blocked():
    """Over context, tensor and data axes, causal and not."""
    for causal in (True, False):
        run = functools.partial(attention, causal=causal, backend="blocked")
        for mesh in (MeshConfig(1, 1, 1, 8), MeshConfig(1, 2, 2, 2), MeshConfig(2, 1, 1, 3)):
            compare(run, mesh, 4, 144, 4, 8, jnp.float32, causal, 1e-5)


def splash_kernel():
    """The TPU kernel in interpret mode, over tensor and context axes."""
    causal, full = (functools.partial(splash.attention, causal=each, interpret=True) for each in (True, False))
    for H in (64, 96, 128):
        for T, context in ((1024, 1), (1024, 4), (2304, 1), (2304, 2)):
            compare(causal, MeshConfig(1, 1, 2, context), 1, T, 2, H, jnp.float32, True, 1e-5)
    compare(causal, MeshConfig(1, 1, 2, 4), 1, 1024, 2, 64, jnp.bfloat16, True, 2e-2)
    compare(causal, MeshConfig(1, 1, 2, 2), 1, 2304, 2, 128, jnp.bfloat16, True, 2e-2)
    compare(full, MeshConfig(1, 2, 1, 4), 2, 1024, 2, 64, jnp.float32, False, 1e-5)


def main(check):
    next(each for each in (blocked, splash_kernel) if each.__name__ == check)()


if __name__ == "__main__":
    main(*sys.argv[1:])
