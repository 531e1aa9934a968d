"""Parses a compiled program's text (HLO): computations, instructions, loop trip counts, sizes in bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, kind: str) -> str | None:
        """The computation named by an attribute such as `body`."""
        found = re.search(rf"\b{kind}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def base(self) -> str:
        """The opcode without -start."""
        return self.opcode.removesuffix("-start")


Computation = dict[str, Instruction]  # in order; the root comes last


def parse(text: str) -> dict[str, Computation]:
    """Computations by name; the one that runs is ENTRY too."""
    program: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = program[header[2]] = {}
            if header[1]:
                program["ENTRY"] = current
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            kind, rest = _split_type(line[found.end():])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split_parenthesis(rest)
            current[found[1]] = Instruction(found[1], kind, opcode.strip(),
                                            tuple(re.findall(r"%([\w.\-]+)", operands)) or (operands,), attributes)
    return program


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = _split_parenthesis(text[1:])
    return f"({inside})", rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """What lies before and after the parenthesis that closes one opened just before `text`."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[:found.start()], text[found.end():]
    return text, ""


def executed(program: dict[str, Computation], computation: Computation, times: float
              ) -> Iterator[tuple[Computation, Instruction, float]]:
    """Every instruction that runs, with its computation and how often; bodies of fusions are not gone into."""
    for instruction in computation.values():
        yield computation, instruction, times
        if instruction.opcode == "while":
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
    """How often a loop runs: stated, or from the bound that its counter, which starts at 0, is compared to."""
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    condition = program[loop.called("condition")]
    compared = list(condition.values())[-1]
    # The comparison may stand alone in a fusion.
    if compared.opcode != "fusion" and not (compared.opcode == "compare" and "direction=LT" in compared.attributes):
        return None
    operands = [condition[name] for name in compared.operands]
    indices = [int(re.search(r"index=(\d+)", operand.attributes)[1]) for operand in operands
               if operand.opcode == "get-tuple-element"]
    bounds = [_constant(operand) for operand in operands if operand.opcode == "constant"]
    counters = indices
    if not bounds:  # the bound travels with the loop: see what it started as
        start = computation[loop.operands[0]]
        if start.opcode != "tuple":
            return None
        values = {index: _source(computation, start.operands[index]) for index in indices}
        bounds = [_constant(value) for value in values.values() if value.opcode == "constant" and _constant(value)]
        counters = [index for index, value in values.items() if not (value.opcode == "constant" and _constant(value))]
    if len(bounds) != 1 or not bounds[0] or len(counters) != 1:
        return None
    return -(-bounds[0] // _step(program[loop.called("body")], counters[0]))


def _step(body: Computation, counter: int) -> int:
    """By how much a loop's counter grows on each turn: two turns in one, where XLA has unrolled it."""
    root = list(body.values())[-1]
    grown = _source(body, root.operands[counter]) if root.opcode == "tuple" else root
    added = [_source(body, name) for name in grown.operands] if grown.opcode == "add" else []
    steps = [_constant(each) for each in added if each.opcode == "constant"]
    return steps[0] if steps and steps[0] else 1


def _source(computation: Computation, name: str) -> Instruction:
    while computation[name].opcode in ("copy", "bitcast") and computation[name].operands[0] in computation:
        name = computation[name].operands[0]
    return computation[name]


def _constant(instruction: Instruction) -> int | None:
    return int(instruction.operands[0]) if re.fullmatch(r"\d+", instruction.operands[0]) else None


# Memory.

def bytes_of(kind: str, memory_only: bool = False) -> float:
    """Bytes of a type, a tuple's elements together; with `memory_only` those that lie in the device's main memory."""
    total = 0.0
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", kind):
        if memory_only and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["32"])[0])
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
    return total
