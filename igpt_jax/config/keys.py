"""Configuration keys: `key` declares one with its default, help text and rules; `Keys` is a group of them.

    steps: int = key(10_000, "optimizer steps", resume="same", rule=at_least(1))

A group is a frozen dataclass that derives from `Keys`. A job's configuration is a group that contains other groups.
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

MOST_SHOWN = 20  # names in one message
PRECISIONS = ("bfloat16", "float32", "float64")


class UserError(Exception):
    """An error in the user's input. The message says in one line what is wrong and how to fix it."""


def nearest(word: str, known: Sequence[str]) -> str:
    """'Did you mean ...?' with the most similar of `known`; else the three nearest, or all where they are few."""
    ranked = sorted(known, key=lambda name: -_similarity(word, name))
    if ranked and _similarity(word, ranked[0]) > 0.6:
        return f"Did you mean {ranked[0]!r}?"
    if len(known) <= MOST_SHOWN:
        return f"Known: {', '.join(known)}."
    return f"The nearest are {', '.join(ranked[:3])}. --help lists all {len(known)}."


def _similarity(word: str, name: str) -> float:
    """0 to 1. The last part of a dotted name counts as the whole, and so do the initials of its words (lr, bs)."""
    given, last = word.rpartition(".")[2], name.rpartition(".")[2]
    if len(given) > 1 and given in (last, "".join(part[:1] for part in last.split("_"))):
        return 1.0
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((word, name), (given, last)))


def precision_on(precision: str, platform: str) -> str:
    """The key `precision`, with auto replaced for a platform of JAX.

    auto is bfloat16 on accelerators. CPUs get float32: there bfloat16 is slower for small models.
    """
    if precision != "auto":
        return precision
    return "float32" if platform == "cpu" else "bfloat16"


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` if the condition is false."""
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
    """low <= value <= high; a round bracket excludes that end."""
    def rule(name: str, value: float) -> None:
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        require(above and below, f"{name}={value} must lie in {ends[0]}{low}, {high}{ends[1]}.")
    return rule


def one_of(*known: str) -> Rule:
    """The value is one of `known`."""
    return lambda name, value: require(value in known, f"{name}={value!r} is not known. {nearest(value, known)}")


def each(rule: Rule) -> Rule:
    """Every element of a tuple obeys `rule`."""
    def of_all(name: str, values: Sequence[Any]) -> None:
        for value in values:
            rule(name, value)
    return of_all


def seed_range(name: str, value: int) -> None:
    """A seed that JAX takes without truncation."""
    require(0 <= value < 2**32, f"{name}={value} must lie in [0, 2^32).")


def shard_syntax(name: str, value: str) -> None:
    """Empty, merge or i/n, as `slice_of` reads it."""
    slice_of(value)


# Keys and groups.

def key(default: Any, doc: str, *, resume: Literal["same", "free", "schedule"], rule: Rule | None = None,
        compiled: bool = True, alias: str = "") -> Any:
    """A configuration key.

    Args:
      default: the default value.
      doc: a noun phrase with its unit, for --help.
      resume: whether a run may resume from a checkpoint with another value. same: no; free: yes, it changes no result;
        schedule: only if no learning rate of the steps before the checkpoint depends on it.
      rule: called with the key's dotted name and value; raises UserError for an invalid value.
      compiled: whether a compiled step can depend on it; `plan` caches its verdicts by these keys.
      alias: a former name, accepted for one more version.
    """
    attributes = {"doc": doc, "resume": resume, "rule": rule, "compiled": compiled, "alias": alias}
    return dataclasses.field(default=default, metadata=attributes)


def section(cls: type) -> Any:
    """A nested group of keys, as a field of another group."""
    return dataclasses.field(default_factory=cls)


def is_section(field: dataclasses.Field) -> bool:
    """Whether a field of a group is a nested group. Only those have no default but a factory."""
    return field.default is dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Keys:
    """A group of keys. Creating one checks the rule of every key; subclasses add rules that concern several keys."""
    group: ClassVar[str] = ""  # the prefix of its keys' dotted names, such as "model."

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if rule := field.metadata.get("rule"):
                rule(self.group + field.name, getattr(self, field.name))

    def refuse_given(self, *names: str, why: str) -> None:
        """Raises UserError if a key that has no effect is not at its default.

        Args:
          names: of keys in this group; none: all of them.
          why: ends the sentence "KEY=VALUE has no effect", and says what to do.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(bool(names) and field.name not in names or is_section(field) or value == field.default,
                    f"{self.group}{field.name}={value} has no effect {why}")


COMPILER_WORDS = "none", "sparsecore"  # of a key `compiler_options`: see parallel/compiler_options.py


def compiler_options_of(text: str) -> dict[str, bool | int | float | str]:
    """The options of a key `compiler_options`: NAME=VALUE with spaces between them, as in XLA_FLAGS. Raises UserError.

    The words of `COMPILER_WORDS` are no options themselves.
    """
    options: dict[str, bool | int | float | str] = {}
    for word in text.split():
        name, equals, value = word.removeprefix("--").partition("=")
        require(bool(name and value) or word in COMPILER_WORDS,
                f"compiler_options: {word!r} must have the form NAME=VALUE, or be {' or '.join(COMPILER_WORDS)}. Put "
                "spaces between options.")
        if equals:
            options[name] = _literal(value)
    return options


def _literal(text: str) -> bool | int | float | str:
    """A value as XLA distinguishes them: true or false, a number, or text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def compiler_options_text(options: Mapping[str, Any]) -> str:
    """The inverse of `compiler_options_of`."""
    return " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in options.items())


def compiler_options_key() -> Any:
    """The key `compiler_options`, which several jobs have."""
    return key("", "options of XLA's compiler, NAME=VALUE with spaces between, added to the chip's in "
                   "parallel/compiler_options.py; none: without the chip's; sparsecore: with those for the SparseCores "
                   "of TPU v5p and v6e", resume="free",
               rule=lambda name, value: compiler_options_of(value) and None)


def slice_of(shard: str) -> tuple[int, int]:
    """(i, n) of a key `shard` with the value i/n; (0, 1) if it is empty or `merge`. Raises UserError."""
    if shard in ("", "merge"):
        return 0, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    require(bool(found), f"shard={shard!r} must be i/n, such as 0/16, or merge.")
    i, n = int(found[1]), int(found[2])
    require(0 <= i < n, f"shard={shard!r}: slices are 0/n to n-1/n.")
    return i, n
