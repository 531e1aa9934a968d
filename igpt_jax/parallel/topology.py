"""Speed, memory and prices of accelerators, and the topologies that `plan` knows. No JAX is imported here.

Sources, read in 2026:
- TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} ("peak compute per chip (bf16)", "HBM capacity", "HBM bandwidth");
  the table of jax-ml.github.io/scaling-book for links (one direction of one torus axis) and the network between slices.
- NVIDIA: the data sheets of A100, H100 and H200 (dense bf16 without sparsity; NVLink, one direction); one network card
  per GPU (200 Gbit/s for an A100, 400 for an H100 or H200). An H200's memory is what nvidia-smi shows, 143,771 MiB.
- Prices: on-demand list prices, US regions, 2025. They change, so `plan` takes the user's own.
"""

import dataclasses
import itertools
import math
import re
import types
from collections.abc import Mapping

from igpt_jax.config import UserError, nearest

GIB = 2**30
GPU_SHARE = 0.75  # share of a GPU's memory that JAX allocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts devices (a TPU v4 or v5p chip, with both of its cores, is one device)."""
    name: str
    peak_bf16_flops: float  # FLOP/s, dense
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    device_kinds: tuple[str, ...]  # its names in jax.Device.device_kind
    usable_bytes: int  # the part of hbm_bytes that a program can use
    link_bandwidth: float  # bytes/s sent to neighbors: a TPU around one ring, both directions; a GPU over NVLink
    network_bandwidth: float  # bytes/s that a device sends between slices or nodes
    dollars_per_hour: float  # list price of one device


def _tpu(name: str, flops: float, gib: int, bandwidth: float, kinds: tuple[str, ...], link: float, network: float,
         dollars: float) -> Chip:
    # The compiler reserves a quarter GiB of a TPU's memory, more on v4. These are the limits that its errors state.
    usable = {"TPU v4": 30.75, "TPU v5e": 15.75, "TPU v5p": 94.75, "TPU v6e": 31.25}[name]
    return Chip(name, flops, gib * GIB, bandwidth, kinds, int(usable * GIB), 2 * link, network, dollars)


def _gpu(name: str, flops: float, memory: int, bandwidth: float, kind: str, link: float, network: float,
         dollars: float) -> Chip:
    return Chip(name, flops, memory, bandwidth, (kind,), int(GPU_SHARE * memory), link, network, dollars)


CHIPS = (
    _tpu("TPU v4", 275e12, 32, 1228e9, ("TPU v4",), 45e9, 6.25e9, 3.22),
    _tpu("TPU v5e", 197e12, 16, 819e9, ("TPU v5 lite", "TPU v5e"), 45e9, 3.1e9, 1.20),
    _tpu("TPU v5p", 459e12, 95, 2765e9, ("TPU v5", "TPU v5p"), 90e9, 6.25e9, 4.20),
    _tpu("TPU v6e", 918e12, 32, 1640e9, ("TPU v6 lite", "TPU v6e"), 90e9, 12.5e9, 2.70),
    _gpu("A100 40GB", 312e12, 40 * GIB, 1555e9, "NVIDIA A100-SXM4-40GB", 300e9, 25e9, 2.9),
    _gpu("A100 80GB", 312e12, 80 * GIB, 2039e9, "NVIDIA A100-SXM4-80GB", 300e9, 25e9, 3.7),
    _gpu("H100 SXM", 989e12, 80 * GIB, 3350e9, "NVIDIA H100 80GB HBM3", 450e9, 50e9, 8.0),
    _gpu("H200 SXM", 989e12, 143_771 * 2**20, 4800e9, "NVIDIA H200", 450e9, 50e9, 9.0),
)
# Round numbers, so that `plan` can be tried without accelerators. Times planned for CPUs are not predictions.
CPU = Chip("CPU", 1e11, 2**63 - 1, 2e10, ("cpu",), 2**63 - 1, 1e10, 1e9, 0.0)

# By the kind that a topology's name begins with: the chip, and for TPUs the number of dims of a slice.
TPUS: Mapping[str, tuple[str, int]] = types.MappingProxyType({
    "v4": ("TPU v4", 3), "v5e": ("TPU v5e", 2), "v5p": ("TPU v5p", 3), "v6e": ("TPU v6e", 2)})
GPUS: Mapping[str, str] = types.MappingProxyType({
    "a100": "A100 80GB", "h100": "H100 SXM", "h200": "H200 SXM"})
# Chips of the largest slice whose number is a power of two, by its number of dims.
LARGEST_SLICE: Mapping[int, int] = types.MappingProxyType({2: 256, 3: 4096})
EXAMPLES = ("v4:4x4x4", "v5e:16x16", "v5e:16x16*4", "v5p:4x4x8", "v6e:16x16", "a100:8", "h100:8", "h100:8x4", "h200:8",
            "cpu:8", "attached")


@dataclasses.dataclass(frozen=True)
class Target:
    """A group of devices that a step can be compiled for.

    Attributes:
      name: such as `v5e:16x16`.
      platform: 'tpu', 'gpu', 'cpu', or 'attached' for the devices of this machine.
      chip: None for 'attached', whose devices are known only to JAX.
      shape: chips of one slice along each torus axis; (GPUs,) of one node.
      groups: number of slices or nodes.
    """
    name: str
    platform: str
    chip: Chip | None
    shape: tuple[int, ...] = ()
    groups: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.groups


def parse(text: str) -> Target:
    """The target with this name: `v5e:16x16`, `v5e:16x16*4` (slices), `h100:8`, `h100:8x4` (nodes), `cpu:8`.

    Raises:
      UserError: an unknown kind, or a shape that this kind does not have.
    """
    kind, _, size = text.partition(":")
    if text == "attached":
        return Target(text, "attached", None)
    if kind not in (*TPUS, *GPUS, "cpu"):
        raise UserError(f"topology={text!r} is not known. {nearest(text, EXAMPLES)} Kinds: "
                        f"{', '.join([*TPUS, *GPUS, 'cpu', 'attached'])}.")
    if kind in TPUS:
        chip, dims = TPUS[kind]
        match = re.fullmatch(r"(\d+(?:x\d+)*)(?:\*(\d+))?", size)
        shape = tuple(map(int, match[1].split("x"))) if match else ()
        if len(shape) != dims or 0 in shape or match[2] == "0":
            raise UserError(f"topology={text!r}: a slice of {kind} has {dims} dims, such as {kind}:"
                            f"{'16x16' if dims == 2 else '4x4x8'}, and *4 after them for 4 slices.")
        return Target(text, "tpu", chip_named(chip), shape, int(match[2] or 1))
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?" if kind in GPUS else r"([1-9]\d*)", size)
    if not match:
        raise UserError(f"topology={text!r} must name a number of devices: {kind}:8"
                        + (f", or {kind}:8x4 for 4 nodes." if kind in GPUS else "."))
    if kind == "cpu":
        return Target(text, "cpu", CPU, (int(size),))
    return Target(text, "gpu", chip_named(GPUS[kind]), (int(match[1]),), int(match[2] or 1))


def like(device_kind: str, count: int) -> Target:
    """The target of `count` devices of the kind `jax.Device.device_kind`, in the most square shape.

    Raises:
      UserError: the kind or the number of devices is not in the tables.
    """
    if device_kind == "cpu":
        return parse(f"cpu:{count}")
    chip = chip_for(device_kind)
    kind = next((kind for kind, (name, _) in TPUS.items() if chip and name == chip.name), None)
    if kind:
        target = resized(Target(kind, "tpu", chip, (1,) * TPUS[kind][1]), count)
    elif chip:
        target = resized(Target(chip.name.split()[0].lower(), "gpu", chip), count)
    if not chip:
        raise UserError(f"devices of kind {device_kind!r} are not in igpt_jax/parallel/topology.py. Add a row to CHIPS,"
                        " or plan for a topology by name.")
    if not target:
        raise UserError(f"{count} devices of kind {device_kind!r} are not whole {'slices' if kind else 'nodes of 8'}. "
                        "Plan for a topology by name.")
    return target


def resized(target: Target, devices: int) -> Target | None:
    """The same kind of target with another number of devices, in the most square shape; None where none exists."""
    kind = target.name.partition(":")[0]
    if target.platform == "tpu":
        largest = math.prod(target.shape) if target.groups > 1 else LARGEST_SLICE[len(target.shape)]
        slices, rest = divmod(devices, largest) if devices > largest else (1, 0)
        shape = max(_factors(devices // slices, len(target.shape)), key=sorted, default=None)
        if rest or not shape:
            return None
        sides = sorted(shape, key=lambda side: (side == 1, side))  # 4x4x8, but 2x2x1
        return parse(f"{kind}:{'x'.join(map(str, sides))}{f'*{slices}' if slices > 1 else ''}")
    if target.platform == "gpu" and devices > 8:
        nodes, rest = divmod(devices, 8)
        return None if rest else dataclasses.replace(target, name=f"{kind}:8x{nodes}", shape=(8,), groups=nodes)
    return dataclasses.replace(target, name=f"{kind}:{devices}", shape=(devices,), groups=1)


def _factors(number: int, count: int) -> list[tuple[int, ...]]:
    """All ways to write `number` as an ordered product of `count` powers of two; none unless it is one itself."""
    if count == 1:
        return [(number,)] if number & (number - 1) == 0 else []
    found = []
    for power in range(number.bit_length()):
        if number % (1 << power) == 0:
            found += [(1 << power, *rest) for rest in _factors(number >> power, count - 1)]
    return found


def chip_named(name: str) -> Chip:
    """The row of CHIPS with this name."""
    return next(chip for chip in CHIPS if chip.name == name)


def chip_for(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None for CPUs and chips that are not in the table.

    Only exact names match: the PCIe cards of a generation are slower than its SXM modules, and a wrong peak would
    give a wrong MFU, which is worse than none.
    """
    for chip in CHIPS:
        if device_kind in chip.device_kinds:
            return chip
    return None


def bandwidth(target: Target, mesh_shape: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """Bytes/s that a device sends in a collective over the mesh axes `axes`, limited by the slowest link."""
    chip, inside = target.chip, target.devices // target.groups
    order = list(mesh_shape)
    # The last mesh axis is innermost, so neighbors along an axis are as many devices apart as all later axes multiply
    # to. A collective over `axes` spans that many devices times its own. It stays inside slices or nodes if these hold
    # a whole number of spans, and crosses the network otherwise.
    span = math.prod(mesh_shape[axis] for axis in order[min(order.index(axis) for axis in axes):])
    if target.groups > 1 and inside % span:
        return chip.network_bandwidth
    if target.platform != "tpu":
        return chip.link_bandwidth
    return chip.link_bandwidth * _rings(target, math.prod(mesh_shape[axis] for axis in axes))


def _rings(target: Target, devices: int) -> float:
    """The number of rings that a group of `devices` chips of a slice sends around; a line without wrap-around is half.

    Slices of v5e and v6e have wrap-around links along sides of 16 chips. Those of v4 and v5p have them along all sides,
    if each side is a multiple of 4 (jax-ml.github.io/scaling-book/tpus, "TPU Networking").
    """
    wraps = [side == 16 if len(target.shape) == 2 else all(each % 4 == 0 for each in target.shape)
             for side in target.shape]
    # JAX gives a mesh axis the sides whose product it is. Other axes fill the longest side and a part of the next; a
    # part of a side is a line.
    sides = list(zip(target.shape, wraps, strict=True))
    whole = (chosen for count in range(len(sides), 0, -1) for chosen in itertools.combinations(sides, count)
             if math.prod(side for side, _ in chosen) == devices)
    rings = 0.0
    for side, ring in next(whole, sorted(sides, reverse=True)):
        along = math.gcd(devices, side)
        devices //= along
        if along > 1:
            rings += 1.0 if ring and along == side else 0.5
    return rings
