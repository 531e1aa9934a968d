"""Counts the bytes that a compiled program moves: to and from memory, and between devices by mesh axis.

All is read from the program's text (`planner.hlo`), since XLA's `cost_analysis` counts the body of a loop once. The
rules are:

- An instruction counts once per iteration of the loops around it.
- Arrays in on-chip memory (`S(1)` in a layout) are no traffic.
- A slice of the stacked weights of all layers counts as the slice; an update in place counts as the update.
- A collective that the compiler spreads over several fusions, to overlap it with other work, counts once.

Example: a scan over 48 layers whose body slices one layer out of weights bf16[48,1536,6144] and multiplies. The slice
reads 18 MiB in each of 48 iterations, 0.84 GiB together. If each slice counted as its whole operand, this would be 48
times as much.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from igpt_jax.planner.hlo import Computation, Instruction, bytes_of, executed, parse, trip_count

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTES = ("fusion", "dot", "convolution", "custom-call", "while", "call")
# Opcodes that move nothing themselves: bookkeeping, containers, or the second half of a pair whose first half counts.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "send", "recv"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves in one run of a program.

    Attributes:
      memory_bytes: read from and written to its memory.
      collective_bytes: sent to other devices, by the mesh axes that they differ along ('fsdp', 'data+fsdp').
      overlapped_bytes: the part of them that travels during computation.
      collectives: number of collectives that run, by kind.
      unknown_loops: number of loops of unknown length, which count as one iteration each.
    """
    memory_bytes: float
    collective_bytes: Mapping[str, float]
    overlapped_bytes: float
    collectives: Mapping[str, float]
    unknown_loops: int


def traffic(text: str, mesh_shape: Mapping[str, int]) -> Traffic:
    """Counts the traffic of a partitioned, optimized HLO module.

    Args:
      text: `compiled.as_text()`, or XLA's dump after optimizations.
      mesh_shape: sizes of the mesh axes by name. Their order is that of the device numbers in the text.
    """
    program = parse(text)
    memory, overlapped, sent, counts, unknown = 0.0, 0.0, defaultdict(float), defaultdict(float), 0
    for computation, instruction, times in executed(program, program["ENTRY"], 1.0):
        unknown += instruction.opcode == "while" and trip_count(program, computation, instruction) is None
        memory += times * memory_bytes_of(program, computation, instruction)
    for send in sends(program, mesh_shape):
        sent[send.axes] += send.bytes
        counts[send.kind] += send.times
        overlapped += send.bytes * (send.spread or _computes_until_done(send.computation, send.instruction))
    return Traffic(memory, dict(sent), overlapped, dict(counts), unknown)


@dataclasses.dataclass(frozen=True)
class Send:
    """A collective that moves bytes between devices.

    Attributes:
      computation, instruction: where it runs; the instruction may be a fusion around it.
      kind: its opcode without -start.
      axes: mesh axes that its devices differ along, joined with +.
      times: number of runs.
      bytes: sent by one device in all runs.
      spread: whether it is split over several fusions, to overlap with other work.
    """
    computation: Computation
    instruction: Instruction
    kind: str
    axes: str
    times: float
    bytes: float
    spread: bool


def sends(program: dict[str, Computation], mesh_shape: Mapping[str, int]) -> Iterator[Send]:
    """Yields each collective that runs, once."""
    chains = set()
    for computation, instruction, times in executed(program, program["ENTRY"], 1.0):
        for where, collective, kind in _collectives(program, computation, instruction):
            # The TPU compiler overlaps a collective with other work by spreading it over several fusions. Each holds a
            # copy of the instruction with the same chain and channel, so that only the first one counts.
            chain = re.search(r'chain_id="\d+"', collective.attributes)
            if chain:
                link = chain[0], re.search(r"channel_id=\d+", collective.attributes)[0]
                if link in chains:
                    continue
                chains.add(link)
            axes, size = _group(collective.attributes, mesh_shape)
            if size > 1:
                yield Send(computation, instruction, kind, axes, times, times * _sent(collective, where, kind, size),
                           bool(chain))


def _computes_until_done(computation: Computation, start: Instruction) -> bool:
    """Whether something is computed between a start and its done, in the order of the schedule."""
    if not start.opcode.endswith("-start"):
        return False
    order = list(computation.values())
    for each in order[order.index(start) + 1:]:
        if start.name in each.operands:
            # An async-start may get its operands only from an update, which then begins the transfer.
            if each.opcode != "async-update":
                return False
            start = each
        elif each.opcode in COMPUTES and start.operands != ("",):
            return True
    return False


# Collectives.

def _collectives(program: dict[str, Computation], computation: Computation, instruction: Instruction
                 ) -> Iterator[tuple[Computation, Instruction, str]]:
    """Yields the collective that an instruction is, or those inside a fusion or a call of a SparseCore: computation,
    collective, kind."""
    if instruction.base in COLLECTIVES:
        yield computation, instruction, instruction.base
    elif instruction.opcode == "send":
        # Between TPU slices libtpu lowers a collective to send and recv through its own transfer layer, megascale.
        if kind := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes):
            yield computation, instruction, kind[1].lower().replace("_", "-")
    elif instruction.opcode == "fusion":
        inside = program[instruction.called("calls")]
        sliced = any(each.opcode == "dynamic-slice" for each in inside.values())
        for each in inside.values():
            if each.base in COLLECTIVES:
                # TPU programs have no reduce-scatter: a fusion sums over the devices and takes the device's slice.
                yield inside, each, "reduce-scatter" if each.base == "all-reduce" and sliced else each.base
    elif instruction.opcode == "async-start":
        for call in program[instruction.called("calls")].values():
            if name := call.called("called_computations"):
                inside = program[name]
                yield from ((inside, each, each.base) for each in inside.values() if each.base in COLLECTIVES)


def _group(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """The mesh axes that the devices of one group differ along, joined with +, and the size of a group.

    The text spells groups in four ways, tried in turn. Without any, all devices are one group. On a mesh data=2 x
    fsdp=2, in which devices 0 and 2 differ along data, these all give "data":

    - `source_target_pairs={{0,2},{2,0}}`, the pairs of a permutation;
    - `replica_groups={{0,2},{1,3}}`, lists of devices;
    - `replica_groups=[2,2]<=[2,2]T(1,0)`: devices in order, as the shape after <=, transposed, then cut into groups;
    - `replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}`, names of mesh axes. `, device_ids=([2,2]T(1,0))` after
      the mesh gives its devices where they are not in order, and `'axis_0':(1)2` a part of an axis: 2 after 1.
    """
    if slices := re.search(r'_xla_megascale_target="\{([\d,]+)\}', attributes):
        # TPU slices are split along the first mesh axis larger than 1.
        return next((axis for axis, size in mesh_shape.items() if size > 1), ""), len(slices[1].split(","))
    sizes = tuple(mesh_shape.values())
    devices = np.arange(math.prod(sizes))
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        pairs = np.array([list(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
        moved = pairs[pairs[:, 0] != pairs[:, 1]]  # a device may also send to itself
        differ = np.array(np.unravel_index(moved[:, 0], sizes)) != np.array(np.unravel_index(moved[:, 1], sizes))
        # A permutation has no groups. Any size above 1 says that bytes move, and `_sent` does not use it for
        # permutations.
        return _names(differ.any(axis=1), mesh_shape), 2
    # All groups of a collective differ along the same axes, so that the first one says which.
    groups = devices[None]
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]+\})\}", attributes):
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])][:1]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        groups = _ordered(devices, iota[3]).reshape(int(iota[1]), int(iota[2]))
    elif named := re.search(r"replica_groups=(?:@?\w+)?mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? *\{([^}]*)\}",
                            attributes):
        used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
        dims: list[int] = []  # of the devices, each axis cut at its used parts
        within: list[int] = []
        for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1]):
            done = 1
            for before, part in sorted((int(before or 1), int(part or size)) for used_name, before, part in used
                                       if used_name == name):
                dims += [before // done, part]
                within.append(len(dims) - 1)
                done = before * part
            dims.append(int(size) // done)
        between = [index for index in range(len(dims)) if index not in within]
        whole = _ordered(devices, named[2]).reshape(dims).transpose(*between, *within)
        groups = whole.reshape(-1, math.prod(dims[index] for index in within))
    coordinates = np.array(np.unravel_index(np.asarray(groups[0]), sizes))
    return _names((coordinates != coordinates[:, :1]).any(axis=1), mesh_shape), len(groups[0])


def _ordered(devices: np.ndarray, text: str | None) -> np.ndarray:
    """The devices in the order of a text: a shape and its transposition, as in [32,8]T(1,0), or a list; None: as is."""
    if not text:
        return devices
    if found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = list(map(int, found[1].split(",")))
        return devices.reshape(dims).transpose(list(map(int, found[2].split(","))) if found[2] else range(len(dims)))
    return np.array(list(map(int, text.split(","))))


def _names(differ: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """Mesh axes joined with +, from a flag for each."""
    return "+".join(axis for axis, used in zip(mesh_shape, differ, strict=True) if used)


def _sent(instruction: Instruction, computation: Computation, kind: str, size: int) -> float:
    """Bytes that one device sends, assuming ring algorithms, which send the least."""
    # With n devices, in an all-gather a device sends its own shard and those that it passes on, n - 1 in all. In a
    # reduce-scatter it sends n - 1 parts of 1/n of its operand. An all-reduce is a reduce-scatter followed by an
    # all-gather of the result. In an all-to-all a device keeps 1/n of its operand and sends the rest.
    given = sum(bytes_of(computation[name].type) for name in instruction.operands if name in computation)
    return given * {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size, "reduce-scatter": (size - 1) / size,
                    "all-to-all": (size - 1) / size}.get(kind, 1)


def _elements(kind: str) -> list[str]:
    """The element types of a tuple (nested ones flat), or the type itself."""
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", kind)


def _in_memory(kind: str) -> bool:
    """Whether any of a type lies in main memory."""
    return bytes_of(kind, memory_only=True) > 0


def memory_bytes_of(program: dict[str, Computation], computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from and writes to main memory in one run."""
    opcode = instruction.opcode
    # AllocateBuffer is a custom call that reserves memory and does not touch it.
    if opcode in FREE or opcode.endswith(("-done", "-update")) or "AllocateBuffer" in instruction.attributes:
        return 0.0
    types = [computation[name].type for name in instruction.operands if name in computation]
    if opcode == "fusion":
        inside = program[instruction.called("calls")]
        parameters = {int(each.operands[0]): each.name for each in inside.values() if each.opcode == "parameter"}
        # Only what enters and leaves a fusion is traffic. Inside, values stay in registers and on-chip memory.
        # At most the whole array: what a fusion uses twice it need not read twice.
        read = sum(min(_read(program, inside, parameters[index]), bytes_of(kind)) for index, kind in enumerate(types)
                   if _in_memory(kind) and index in parameters)
        return read + _written(inside, instruction)
    written = _elements(instruction.type)
    # An asynchronous instruction counts at its start. Its -done was skipped above, or the bytes would count twice.
    if opcode.endswith("-start"):
        # The result is a tuple of operands, results and semaphores, but copy-start's has its result first, and
        # all-reduce-start's is the result alone.
        first = {"copy-start": 0, "all-reduce-start": 0}.get(opcode, len(types))
        written = written[first:first + len(types)]
    # These touch a part of a large array: they move as much of it as of the small one on the other side.
    if instruction.base in ("dynamic-slice", "slice", "gather"):
        part = sum(map(bytes_of, written))
        return part * _in_memory(types[0]) + sum(bytes_of(kind, memory_only=True) for kind in written)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = types[1 if opcode == "dynamic-update-slice" else -1]
        return bytes_of(update, memory_only=True) + bytes_of(update) * _in_memory(types[0])
    return sum(bytes_of(kind, memory_only=True) for kind in (*types, *written))


def _read(program: dict[str, Computation], inside: Computation, name: str) -> float:
    """Bytes that a fusion reads of its parameter `name`: the slices that it takes, or the whole array."""
    total = 0.0
    for user in inside.values():
        if name not in user.operands or user.opcode == "parameter":
            continue
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            total += bytes_of(user.type)
        elif user.opcode == "bitcast":
            total += _read(program, inside, user.name)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            pass  # updated in place: the old values are not read
        elif user.opcode == "fusion":
            within = program[user.called("calls")]
            parameters = {int(each.operands[0]): each.name for each in within.values() if each.opcode == "parameter"}
            total += sum(_read(program, within, parameters[index]) for index, operand in enumerate(user.operands)
                         if operand == name)
        else:
            total += bytes_of(inside[name].type)
    return total


def _written(inside: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an array that it updates in place, the update alone."""
    root = list(inside.values())[-1]
    roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for kind, each in zip(_elements(fusion.type), roots, strict=False):
        # A bitcast only renames the shape. The instruction behind it shows whether the array is updated in place.
        while each.opcode == "bitcast":
            each = inside[each.operands[0]]
        updated = each.opcode == "dynamic-update-slice"
        total += _in_memory(kind) * bytes_of(inside[each.operands[1]].type if updated else kind)
    return total
