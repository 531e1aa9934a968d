"""JAX's settings for a precision of the config."""


import jax

from igpt_jax.metrics.logging import say

# JAX's defaults. Each has an environment variable, which would make a resumed run, or a sample, another one.
PINNED = {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
          "jax_high_dynamic_range_gumbel": False, "jax_numpy_dtype_promotion": "standard",
          "jax_numpy_rank_promotion": "allow", "jax_disable_jit": False}


def set_precision(precision: str) -> None:
    """Makes JAX keep to `precision` of the config: float32 without TF32 or bf16 passes, float64 with 64-bit types; and
    to its defaults in all else that changes what it computes."""
    for name, value in PINNED.items():
        if getattr(jax.config, name, value) != value:  # a later JAX may have no choice there
            say(f"igpt_jax: {name.upper()} has no effect here, where results depend on the config and seed alone")
            jax.config.update(name, value)
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", None if precision == "bfloat16" else "highest")
