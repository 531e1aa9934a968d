"""Versions of the packages that decide what a run computes."""

import importlib.metadata

from igpt_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """{package: version} of igpt_jax and of PACKAGES."""
    return {"igpt_jax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
