"""JAX's settings for a precision of the config."""

import contextlib
from collections.abc import Iterator

import jax

from igpt_jax.metrics.logging import say

# JAX's defaults. An environment variable can change each of them, and with it the results of a resumed run or a sample.
PINNED = {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
          "jax_high_dynamic_range_gumbel": False, "jax_numpy_dtype_promotion": "standard",
          "jax_numpy_rank_promotion": "allow", "jax_disable_jit": False}


def set_precision(precision: str) -> None:
    """Sets JAX to `precision` of the config, and resets all settings that change results to JAX's defaults.

    Args:
      precision: float32 (products without TF32 or bfloat16 passes), float64 (with 64-bit types) or bfloat16.
    """
    for name, value in PINNED.items():
        if getattr(jax.config, name, value) != value:  # a version of JAX without the setting has no other value
            say(f"igpt_jax: {name.upper()} has no effect here: results depend on the config and the seed alone")
            jax.config.update(name, value)
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", _products(precision))


@contextlib.contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Within, this thread computes as a job of that precision does. For a library: the rest of the program keeps its
    settings."""
    everywhere = jax.config.jax_enable_x64
    try:
        with (jax.enable_x64(precision == "float64"), jax.default_matmul_precision(_products(precision)),
              jax.threefry_partitionable(True)):
            yield
    finally:
        if jax.config.jax_enable_x64 != everywhere:  # loading a checkpoint sets it for Orbax's threads too
            jax.config.update("jax_enable_x64", everywhere)


def _products(precision: str) -> str | None:
    """JAX's precision of matrix products."""
    return None if precision == "bfloat16" else "highest"
