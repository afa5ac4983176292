"""The checks the config dataclasses share; each raises ConfigError with the fact and the numbers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.errors import ConfigError, did_you_mean


def at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a number below `minimum`."""
    if not value >= minimum:  # so written, it refuses "not a number" too
        raise ConfigError(f"{key} is {value}; it must be at least {minimum}.")


def between(key: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside `low..high`."""
    if not low <= value <= high:
        raise ConfigError(f"{key} is {value}; it must be between {low} and {high}.")


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Refuse a word that is not one of `known`, with the nearest that is."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(known)}.{did_you_mean(value, known)}")


def divides(key: str, value: int, other_key: str, other: int) -> None:
    """Refuse `other` that is not a multiple of `value`."""
    if other % value:
        raise ConfigError(f"{other_key} ({other}) must be a multiple of {key} ({value}).")


def resources(key: str, wanted: Mapping[str, float]) -> None:
    """Refuse resources of Ray's that have a setting of their own, or of which there is less than none."""
    for name, amount in wanted.items():
        if name.upper() in ("CPU", "GPU"):
            where, dot, last = key.rpartition(".")
            instead = last.replace("resources", f"{name.lower()}s")
            raise ConfigError(f"{key} names {name}, which has a setting of its own. Set {where}{dot}{instead}.")
        at_least(f"{key}.{name}", amount, 0.0)
