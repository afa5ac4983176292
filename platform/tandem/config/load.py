"""YAML and `--set a.b=c` into frozen dataclasses, strictly: an unknown key or a value of the wrong type is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from tandem.config.lines import located
from tandem.errors import ConfigError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML without numbers to the base 60: `12:00:00` is text, as in YAML 1.2, and not 43,200."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for first in "-+0123456789":
    # The first resolver that matches decides.
    base_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")
    _Loader.yaml_implicit_resolvers.setdefault(first, []).insert(0, ("tag:yaml.org,2002:str", base_60))


def load_yaml(cls: type[T], path: Path, overrides: Iterable[str] = ()) -> T:
    """Read `path` as a `cls`, after laying each `a.b=c` of `overrides` over it; an error says in which line."""
    overrides = tuple(overrides)
    with located(path, overrides):
        return from_dict(cls, apply_overrides(read_yaml(path), overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with the line where it is not one."""
    try:
        value = parse_yaml(path.read_text())
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise ConfigError(f"No config file at {path}.{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line} is not YAML: {getattr(error, 'problem', error)}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; a config is a mapping of keys to values.")
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set; `c` is read as YAML, so `[1, 2]`, `true` and `null` work."""
    result: dict[str, Any] = _copy(values)
    for override in overrides:
        key_path, equals, yaml_text = override.partition("=")
        keys = key_path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {override!r} is not of the form key.subkey=value.")
        try:
            value = parse_yaml(yaml_text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML.") from error
        # YAML 1.1 reads 3e-4 as text; the user means the number.
        if isinstance(value, str):
            try:
                value = float(value) if "e" in value.lower() else value
            except ValueError:
                pass
        mapping = result
        for key in keys[:-1]:
            child = mapping.get(key)
            if child is None:
                child = mapping[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override!r}: {key} is a {type(child).__name__}, it has no keys.")
            mapping = child
        mapping[keys[-1]] = value
    return result


def from_dict(cls: type[T], values: Mapping[str, Any], location: str = "") -> T:
    """Build a `cls` from plain values; ConfigError names the key, with the nearest valid one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{location or 'the config'} is {_describe_value(values)}; it must be a mapping.")
    if (as_written := getattr(cls, "as_written", None)) is not None:
        # A class that can be written in more than one way.
        values = as_written(values)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            full_key = f"{location}.{key}" if location else str(key)
            hint = did_you_mean(str(key), fields)
            raise ConfigError(f"{full_key} is not a setting.{hint} Known here: {', '.join(fields)}.")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{f'{location}.{name}' if location else name} is missing.")
    built = {
        name: _convert(hints[name], value, f"{location}.{name}" if location else name) for name, value in values.items()
    }
    try:
        return cls(**built)
    except ConfigError as error:
        # A class does not know its index in a list: its messages name models[].replicas.
        raise ConfigError(
            str(error).replace(re.sub(r"\[\d+\]", "[]", location), location) if location else str(error)
        ) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config dataclass, as YAML or JSON can hold them; `from_dict` reads them back."""
    return cast(dict[str, Any], _to_plain(dataclasses.asdict(config)))


def _convert(hint: Any, value: Any, location: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, location)
    if dataclasses.is_dataclass(hint):
        return from_dict(cast(type[Any], hint), value, location)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{location} is {_describe_value(value)}; it must be a list.")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{location}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{location} has {len(value)} values; it must have {len(args)}.")
        return tuple(_convert(a, v, f"{location}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{location} is {_describe_value(value)}; it must be a mapping.")
        return {str(k): v if args[1] is Any else _convert(args[1], v, f"{location}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, location)


def _convert_scalar(hint: Any, value: Any, location: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
        raise ConfigError(f"{location} is {_describe_value(value)}; it must be a finite number.")
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if hint is str and isinstance(value, float):
        # YAML has read 1.10 as 1.1 by now; the original text is lost.
        raise ConfigError(f"{location} is a number, {value}; put it in quotes to have it as text, letter for letter.")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(hint, str(hint))
    raise ConfigError(f"{location} is {_describe_value(value)}; it must be {kind}.")


def _describe_value(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_to_plain(v) for v in value]
    return value
