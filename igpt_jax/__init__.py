"""Image GPT (Chen et al., 2020) in JAX: pretraining, evaluation and sampling at any scale.

From Python (docs/python.md):

    import igpt_jax

    model = igpt_jax.load("runs/pretrain")
    model.complete("picture.png", n=4)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt_jax.api import ImageModel, load
    from igpt_jax.config import UserError

__version__ = "0.1.0"
__all__ = ["ImageModel", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python interface, and JAX with it, on its first use: importing the package alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module 'igpt_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("igpt_jax.config" if name == "UserError" else "igpt_jax.api"), name)
