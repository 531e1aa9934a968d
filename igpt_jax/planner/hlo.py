"""Parses the text of a compiled program (HLO): computations, instructions, loop trip counts, sizes in bytes.

The text is the only place that has everything a plan needs. `memory_analysis` gives totals alone, and `cost_analysis`
counts the body of a loop once: a scan over 48 layers is then off by a factor of 48. An instruction looks like this:

    %gather.3 = f32[16,4]{1,0:S(1)} all-gather(%weights), channel_id=7, replica_groups=[2,2]<=[4]
    name        type and layout     opcode     operands   attributes

`S(n)` in a layout is a memory space. 0 (not printed) is the device's main memory; others are on the chip or the host.
The format changes between versions of XLA. This parser therefore reads only what it needs, and returns None for a trip
count that it does not recognize. `tests/test_plan_program.py` holds a module small enough to add up by hand.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# Bits of an element, of the types whose name does not say them. A predicate takes a whole byte, and a token no memory.
BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `operands` are names, or the literal of a constant or number of a parameter."""
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, kind: str) -> str | None:
        """The computation that an attribute such as `body` names, also as `kind={%name}`."""
        found = re.search(rf"\b{kind}=\{{?%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def base(self) -> str:
        """The opcode without -start: asynchronous instructions come as a pair of X-start and X-done."""
        return self.opcode.removesuffix("-start")


Computation = dict[str, Instruction]  # in the order of the text, where the root comes last


def parse(text: str) -> dict[str, Computation]:
    """Returns computations by name; the one that runs is also under "ENTRY"."""
    program: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = program[header[2]] = {}
            if header[1]:
                program["ENTRY"] = current
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            # The type of a tuple holds spaces and parentheses, so that a regular expression cannot end it.
            kind, rest = _split_type(line[found.end():])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split_parenthesis(rest)
            # Constants and parameters have no operands with %. Their literal or number stands in the same place, and is
            # kept instead.
            current[found[1]] = Instruction(found[1], kind, opcode.strip(),
                                            tuple(re.findall(r"%([\w.\-]+)", operands)) or (operands,), attributes)
    return program


def _split_type(text: str) -> tuple[str, str]:
    """The type at the start of `text`, a tuple's in parentheses, and the rest."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = _split_parenthesis(text[1:])
    return f"({inside})", rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """The text before and after the closing parenthesis of one that was opened just before `text`."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[:found.start()], text[found.end():]
    return text, ""


def executed(program: dict[str, Computation], computation: Computation, times: float
              ) -> Iterator[tuple[Computation, Instruction, float]]:
    """Yields every instruction that runs, with its computation and how many times it runs.

    A loop of unknown length counts as one iteration, and of a conditional all branches run. The insides of a fusion are
    not yielded: they run in registers and on-chip memory, and only the fusion's operands and result are traffic.
    """
    for instruction in computation.values():
        yield computation, instruction, times
        if instruction.opcode == "while":
            # Times multiply: a loop over 4 microbatches around a loop over 48 layers runs the layer's body 192 times.
            inner = times * (trip_count(program, computation, instruction) or 1)
            yield from executed(program, program[instruction.called("body")], inner)
        elif instruction.opcode == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%([\w.\-]+)", found[1]) if found else [
                instruction.called("true_computation"), instruction.called("false_computation")]
            for name in names:
                yield from executed(program, program[name], times)
        elif instruction.opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls")
            yield from executed(program, program[name], times)


def trip_count(program: dict[str, Computation], computation: Computation, loop: Instruction) -> int | None:
    """The number of iterations of a `while`; None if the text does not show it.

    Some compilers state it as an attribute. Otherwise it comes from the loop itself: a scan counts from 0 up to a
    bound, by the step of its counter. For a scan over 12 layers that XLA has unrolled twice the text has

        condition:  %bound = s32[] constant(12)
                    ROOT %compare = pred[] compare(%counter, %bound), direction=LT
        body:       %two = s32[] constant(2)
                    %next = s32[] add(%counter, %two)

    where %counter is the same element of the loop's state in both. The count is 12 / 2 = 6.
    """
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    condition = program[loop.called("condition")]
    compared = list(condition.values())[-1]
    # The comparison may be wrapped in a fusion, whose operands are the same two.
    if compared.opcode != "fusion" and not (compared.opcode == "compare" and "direction=LT" in compared.attributes):
        return None
    operands = [condition[name] for name in compared.operands]
    indices = [int(re.search(r"index=(\d+)", operand.attributes)[1]) for operand in operands
               if operand.opcode == "get-tuple-element"]
    bounds = [_constant(operand) for operand in operands if operand.opcode == "constant"]
    counters = indices
    if not bounds:
        # The bound is an element of the loop's state rather than a constant of its condition. Which of the two compared
        # elements it is shows in their initial values: a bound starts positive, a counter at 0.
        start = computation[loop.operands[0]]
        if start.opcode != "tuple":
            return None
        values = {index: _source(computation, start.operands[index]) for index in indices}
        bounds = [_constant(value) for value in values.values() if value.opcode == "constant" and _constant(value)]
        counters = [index for index, value in values.items() if not (value.opcode == "constant" and _constant(value))]
    if len(bounds) != 1 or not bounds[0] or len(counters) != 1:
        return None
    # Rounded up: a loop that counts 0, 2, 4 up to 5 runs three times.
    return -(-bounds[0] // _step(program[loop.called("body")], counters[0]))


def _step(body: Computation, counter: int) -> int:
    """How much a loop's counter grows per iteration: 2 if XLA has unrolled the loop twice."""
    root = list(body.values())[-1]
    grown = _source(body, root.operands[counter]) if root.opcode == "tuple" else root
    added = [_source(body, name) for name in grown.operands] if grown.opcode == "add" else []
    # If the step is not visible, 1 is assumed: the count is then too high rather than too low.
    steps = [_constant(each) for each in added if each.opcode == "constant"]
    return steps[0] if steps and steps[0] else 1


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction that computes `name`, behind copies and bitcasts."""
    while computation[name].opcode in ("copy", "bitcast") and computation[name].operands[0] in computation:
        name = computation[name].operands[0]
    return computation[name]


def _constant(instruction: Instruction) -> int | None:
    """A constant's value, if it is a non-negative integer."""
    return int(instruction.operands[0]) if re.fullmatch(r"\d+", instruction.operands[0]) else None


# Memory.

def bytes_of(kind: str, memory_only: bool = False) -> float:
    """Bytes of a type, summed over a tuple's elements; with `memory_only` without those outside main memory."""
    total = 0.0
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", kind):
        if memory_only and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["32"])[0])  # f32, s8, u16: bits are in the name
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
    return total
