"""Options for XLA's compiler, by kind of chip. Every job that runs a model, and `plan`, compiles with them.

An option is in the table only if the compiled program shows that it helps; its comment gives the reason and the effect.
`compiler_options` of a config adds to the table or replaces it.
"""

import functools
import logging
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax.config.keys import UserError, compiler_options_of
from igpt_jax.parallel import sharding, topology

log = logging.getLogger(__name__)

Value = bool | int | float | str

# libtpu splits a product with a gathered weight into one product per part of the weight ("windowed einsum"), to overlap
# it with the gather. The sums of the parts go through memory every time. Above this threshold it gathers first. Memory
# traffic of a step, libtpu 0.0.51: iGPT-L 32x32 on v5p:2x4x4 from 425 to 98 GiB, iGPT-S 48x48 on v6e:2x4 from 253 to
# 130 GiB and on v5e:4x4 from 82 to 41 GiB; four layers of an MLP of iGPT-L's widths on v4:2x2x4 from 10.9 to 2.6 GiB.
# On v4, v5p and v6e the gathers then no longer overlap with products. For iGPT-L on v5p:2x4x4 that exposes at most 0.02
# of 0.13 s, by the planner's links.
GATHER_FIRST = types.MappingProxyType({"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000})

# The word `sparsecore` of a config: SparseCores gather and sum while the TensorCore computes. Otherwise no collective
# overlaps with computation on these chips: what overlaps them on v5e, async_collective_fusion, libtpu refuses here.
# Compiled steps, libtpu 0.0.51: 97 to 100 % of the bytes sent overlap (iGPT-XL on v5p:4x4x8: 81 %), instead of none. It
# is not in the table below, because it has not run on a TPU.
SPARSECORE = types.MappingProxyType({
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
    for kind in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")})
WITH_SPARSECORES = "TPU v5p", "TPU v6e"  # on v4 libtpu accepts the options without any effect

OPTIONS: Mapping[str, Mapping[str, Value]] = types.MappingProxyType({
    "TPU v4": GATHER_FIRST, "TPU v5e": GATHER_FIRST, "TPU v5p": GATHER_FIRST, "TPU v6e": GATHER_FIRST})


def resolve(mesh: Mesh, given: str) -> dict[str, Value]:
    """The options to compile with for the devices of `mesh`.

    Args:
      given: the config's `compiler_options`.

    Raises:
      UserError: the compiler does not know a given option, or not with that value; or the chip has no SparseCores.
    """
    device, own, words = mesh.devices.flat[0], compiler_options_of(given), given.split()
    chip = topology.chip_for(device.device_kind)
    name = chip.name if chip else ""
    ours = {} if "none" in words else OPTIONS.get(name, {})
    if "sparsecore" in words:
        if name not in WITH_SPARSECORES:
            raise UserError(f"compiler_options={given!r}: no SparseCore of a {name or device.device_kind} can send, "
                            f"only those of {' and '.join(WITH_SPARSECORES)}. Leave out sparsecore.")
        ours = {**ours, **SPARSECORE}
    for name, value in own.items():
        if refusal := _refusal(mesh, name, value):
            raise UserError(f"compiler_options={given!r}: the compiler refuses {name}: {refusal}. "
                            "Correct or remove it.")
    # Other versions of a compiler may lack an option of ours.
    refused = {name: why for name, value in ours.items() if name not in own and (why := _refusal(mesh, name, value))}
    for name, why in refused.items():
        log.warning("compiler option %s is not used: %s", name, why)
    return {name: value for name, value in {**ours, **own}.items() if name not in refused}


@functools.cache
def _refusal(mesh: Mesh, name: str, value: Value) -> str:
    """Why the compiler refuses an option; empty if it accepts it."""
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=sharding.replicated(mesh), compiler_options={name: value})
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0].rstrip(".")
    return ""
