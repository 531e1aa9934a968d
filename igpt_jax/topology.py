"""What the accelerators can do: peak speed, memory and bandwidth of each chip. No JAX is imported here.

Sources: the vendors' pages, read in 2026. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "peak compute per chip
(bf16)", "HBM capacity" and "bandwidth". NVIDIA: the data sheets of A100, H100 and H200, dense bf16 without sparsity.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts devices (a TPU v4 or v5p chip, with both of its cores, is one device)."""
    name: str
    peak_bf16_flops: float  # FLOP/s, dense
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    device_kinds: tuple[str, ...]  # as jax.Device.device_kind names it


CHIPS = (
    Chip("TPU v4", 275e12, 32 * GIB, 1228e9, ("TPU v4",)),
    Chip("TPU v5e", 197e12, 16 * GIB, 819e9, ("TPU v5 lite", "TPU v5e")),
    Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, ("TPU v5", "TPU v5p")),
    Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, ("TPU v6 lite", "TPU v6e")),
    Chip("A100 40GB", 312e12, 40 * GIB, 1555e9, ("NVIDIA A100-SXM4-40GB",)),
    Chip("A100 80GB", 312e12, 80 * GIB, 2039e9, ("NVIDIA A100-SXM4-80GB",)),
    Chip("H100 SXM", 989e12, 80 * GIB, 3350e9, ("NVIDIA H100 80GB HBM3",)),
    Chip("H200 SXM", 989e12, 141_000_000_000, 4800e9, ("NVIDIA H200",)),
)


def chip_for(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None for CPUs and chips that are not in the table.

    Only exact names match: the PCIe cards of a generation are slower than its SXM modules, and a wrong peak would
    give a wrong MFU, which is worse than none.
    """
    for chip in CHIPS:
        if device_kind in chip.device_kinds:
            return chip
    return None
