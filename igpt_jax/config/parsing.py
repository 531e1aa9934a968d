"""Converts between a job's validated dataclass and its ConfigDict, config.json or command-line text."""

import ast
import contextlib
import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from igpt_jax.config.jobs import JOB_CONFIGS
from igpt_jax.config.keys import UserError, is_section, nearest, require


def to_dict(config: Any) -> dict[str, Any]:
    """A job's dataclass as nested plain dicts, for config.json and checkpoints."""
    return dataclasses.asdict(config)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names: {"model": {"layers": 2}} -> {"model.layers": 2}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def fields_of(job: str) -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted name, dataclass field) of each key of a job. The field's metadata are the arguments of `keys.key`."""
    def walk(cls: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
        for field in dataclasses.fields(cls):
            if is_section(field):
                yield from walk(field.type, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, field
    return walk(JOB_CONFIGS[job], "")


def keys(job: str) -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, help text) of each key of a job."""
    return ((name, field.default, field.metadata["doc"]) for name, field in fields_of(job))


def key_attributes(job: str, attribute: str) -> dict[str, Any]:
    """One argument of `keys.key` (`resume`, `compiled` or `alias`) of each key of a job, by dotted name."""
    return {name: field.metadata[attribute] for name, field in fields_of(job)}


def values_with(config: Any, attribute: str, wanted: Any) -> dict[str, Any]:
    """The values of a job's dataclass whose keys have `wanted` as that argument of `keys.key`, by dotted name."""
    attributes = key_attributes(config.job, attribute)
    return {name: value for name, value in flat(to_dict(config)).items() if attributes[name] == wanted}


def aliases(job: str) -> dict[str, str]:
    """{former dotted name: present dotted name} of the keys that were renamed."""
    renamed = {name: alias for name, alias in key_attributes(job, "alias").items() if alias}
    return {".".join([*name.split(".")[:-1], alias]): name for name, alias in renamed.items()}


def _unresolved(cls: type) -> dict[str, Any]:
    """Defaults as declared, before __post_init__ replaces some of them, such as 0 by the model table's sizes."""
    return {field.name: _unresolved(field.type) if is_section(field) else field.default
            for field in dataclasses.fields(cls)}


def base_config(job: str = "pretrain", arguments: str = "") -> ml_collections.ConfigDict:
    """The locked ConfigDict of `job`'s keys with the paper's defaults.

    Args:
      job: name of a job.
      arguments: `key=value,key=value`, as after the colon in `--config=FILE:...`; `model` is short for `model.name`.

    Raises:
      UserError: an unknown job or key, or a value of the wrong type.
    """
    if job not in JOB_CONFIGS:
        raise UserError(f"job {job!r} is not known. {nearest(job, list(JOB_CONFIGS))}")
    config = ml_collections.ConfigDict(_unresolved(JOB_CONFIGS[job]))
    # A config file may still set a key by its former name. Both names refer to one value.
    for former, name in aliases(job).items():
        *path, last = name.split(".")
        group = config
        for part in path:
            group = group[part]
        group[former.rpartition(".")[2]] = group.get_ref(last)
    return override(config.lock(), arguments)


def override(config: ml_collections.ConfigDict, arguments: str) -> ml_collections.ConfigDict:
    """Sets `key=value,key=value` in a base config and returns it; see `base_config`."""
    for argument in filter(None, re.split(r",(?![^()]*\))", arguments or "")):  # commas within parentheses do not split
        name, equals, text = argument.partition("=")
        require(bool(equals), f"config argument {argument!r} must have the form key=value.")
        _set(config, "model.name" if name == "model" else name, text)
    return config


def _set(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    parent, default = config, config
    for part in name.split("."):
        if not isinstance(default, ml_collections.ConfigDict) or part not in default:
            raise UserError(f"config key {name!r} is not known. {nearest(name, [n for n, *_ in keys(config.job)])}")
        parent, default = default, default[part]
    if isinstance(default, ml_collections.ConfigDict):
        raise UserError(f"config key {name!r} is a group. Set one of {', '.join(f'{name}.{key}' for key in default)}.")
    value: Any = text
    if not isinstance(default, str):
        # Text that is not a Python literal stays text, which `_cast` then refuses with the type that is needed.
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    # The type of an empty tuple says nothing about its elements, so `parse` checks those.
    parent[part] = _cast(name, value, type(default))


def _cast(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind`, the declared type of a key. Integers are accepted for floats. Raises UserError."""
    outer, elements = typing.get_origin(kind) or kind, typing.get_args(kind)
    if outer is tuple and type(value) in (tuple, list):
        return tuple(_cast(f"{name}[{i}]", element, elements[0]) if elements else element
                     for i, element in enumerate(value))
    # `type(value) is`, not isinstance: True is an int to Python, and would pass for 1.
    if outer is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    if type(value) is not outer:
        raise wrong_type(name, value, outer.__name__)
    require(outer is not float or math.isfinite(value), f"config key {name}={value!r} must be finite.")
    # TensorStore, NumPy and JAX take 64 bits, where Python's integers are unlimited.
    require(outer is not int or abs(value) < 2**63, f"config key {name}={value!r} must be below 2^63.")
    return value


def wrong_type(name: str, value: Any, kind: str) -> UserError:
    """The error for a value (or its text) that is not of type `kind`; for 1e3 as an int, with the number to write."""
    hint = ""
    with contextlib.suppress(ValueError, TypeError):
        if kind == "int" and float(value).is_integer():
            hint = f" Write {int(float(value))}."
    return UserError(f"config key {name}={value!r} must be of type {kind}.{hint}")


def parse(job: str, config: Mapping[str, Any]) -> Any:
    """The validated dataclass of `job` from a ConfigDict or a config.json's dict.

    Raises:
      UserError: an unknown key (the message names the nearest known one), an invalid value, or another job's config.
    """
    given = config.get("job", job)
    if given != job:
        raise UserError(f"this config is for the job {given!r}, not {job!r}: pass it to `igpt {given}`.")
    return _build(JOB_CONFIGS[job], plain(job, config), "")


def plain(job: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A ConfigDict or the dict of a config.json as plain dicts, with former key names replaced by present ones."""
    def walk(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        former = {field.metadata["alias"]: name for name, field in fields.items() if field.metadata.get("alias")}
        found = {}
        for name, value in values.items():
            if former.get(name) in values:  # a base config has both names, for the same value
                continue
            name = former.get(name, name)
            # Unknown names and values of the wrong kind stay as they are: `_build` refuses them with a message.
            nested = name in fields and is_section(fields[name]) and isinstance(value, Mapping)
            found[name] = walk(fields[name].type, value) if nested else value
        return found

    return walk(JOB_CONFIGS[job], config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A group of keys from its values; `prefix` is the prefix of its keys' dotted names."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"config key {prefix + name!r} is not known. {nearest(name, list(fields))}")
        if is_section(fields[name]):
            require(isinstance(value, Mapping), f"config key {prefix}{name}={value!r} must be a group of keys.")
            built[name] = _build(fields[name].type, value, f"{prefix}{name}.")
        else:
            built[name] = _cast(prefix + name, value, fields[name].type)
    return cls(**built)
