"""What a configuration key is: its default, its help text, and the rules that it states about itself.

    steps: int = key(10_000, "optimizer steps", resume="same", rule=at_least(1))

A group of keys is a frozen dataclass that derives from `Keys`; a job's configuration is a group with groups in it.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

PRECISIONS = ("bfloat16", "float32", "float64")


class UserError(Exception):
    """Something the user typed or gave cannot work. The message says what, the rule and the fix, in one line."""


def nearest(word: str, known: Sequence[str]) -> str:
    """'Did you mean ...?' with the nearest of `known`, or the list of all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` where the condition does not hold."""
    if not condition:
        raise UserError(message)


# Rules. Each takes a key's dotted name and its value, and raises UserError.

Rule = Callable[[str, Any], None]


def at_least(least: float) -> Rule:
    """value >= least."""
    words = "must not be negative" if least == 0 else f"must be at least {least}"
    return lambda name, value: require(value >= least, f"{name}={value} {words}.")


def positive(name: str, value: float) -> None:
    """value > 0."""
    require(value > 0, f"{name}={value} must be positive.")


def within(low: float, high: float, ends: Literal["[]", "[)", "(]", "()"] = "[]") -> Rule:
    """low <= value <= high; a round bracket leaves that end out."""
    def rule(name: str, value: float) -> None:
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        require(above and below, f"{name}={value} must lie in {ends[0]}{low}, {high}{ends[1]}.")
    return rule


def one_of(*known: str) -> Rule:
    """One of some words."""
    return lambda name, value: require(value in known, f"{name}={value!r} is not known. {nearest(value, known)}")


def each(rule: Rule) -> Rule:
    """A rule for every element of a tuple."""
    def of_all(name: str, values: Sequence[Any]) -> None:
        for value in values:
            rule(name, value)
    return of_all


def seed_range(name: str, value: int) -> None:
    """What JAX takes as a seed without loss."""
    require(0 <= value < 2**32, f"{name}={value} must lie in [0, 2^32).")


def shard_syntax(name: str, value: str) -> None:
    """See `slice_of`."""
    slice_of(value)


# Keys and groups.

def key(default: Any, doc: str, *, resume: Literal["same", "free", "schedule"], rule: Rule | None = None,
        compiled: bool = True, alias: str = "") -> Any:
    """A configuration key.

    Args:
      default: its value where nobody gives another.
      doc: a noun phrase with its unit, for --help.
      resume: whether the same workdir may be resumed with another value. same: refused; free: it changes no result;
        schedule: allowed where neither the learning-rate schedule nor the warm-up depends on it.
      rule: raises UserError for a value that cannot be.
      compiled: whether a compiled step may depend on it; `plan` keeps verdicts by these keys.
      alias: its former name, accepted for one more version.
    """
    stated = {"doc": doc, "resume": resume, "rule": rule, "compiled": compiled, "alias": alias}
    return dataclasses.field(default=default, metadata=stated)


def section(cls: type) -> Any:
    """A nested group of keys."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class Keys:
    """A group of keys. Making one checks every key's own rule; a subclass adds rules over several keys."""
    group: ClassVar[str] = ""  # what its keys' dotted names begin with, such as "model."

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if rule := field.metadata.get("rule"):
                rule(self.group + field.name, getattr(self, field.name))


def slice_of(shard: str) -> tuple[int, int]:
    """(i, n) of a key `shard` that reads i/n; (0, 1) for all and for merge. Raises UserError."""
    if shard in ("", "merge"):
        return 0, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    require(bool(found), f"shard={shard!r} must read i/n, such as 0/16, or merge.")
    i, n = int(found[1]), int(found[2])
    require(0 <= i < n, f"shard={shard!r}: slices are 0/n to n-1/n.")
    return i, n


def fill(sizes: dict[str, int], total: int) -> dict[str, int]:
    """`sizes` with -1 replaced by what makes their product `total`, where that is possible."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {name: total // fixed if size == -1 else size for name, size in sizes.items()}
