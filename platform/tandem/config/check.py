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


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a word that is not one of `allowed`, with the nearest that is."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}.{did_you_mean(value, allowed)}")


def divides(key: str, value: int, other_key: str, other: int) -> None:
    """Refuse `other` that is not a multiple of `value`."""
    if other % value:
        raise ConfigError(f"{other_key} ({other}) must be a multiple of {key} ({value}).")


def resources(key: str, amounts: Mapping[str, float]) -> None:
    """Refuse resources of Ray's that have a setting of their own, and negative amounts."""
    for name, amount in amounts.items():
        if name.upper() in ("CPU", "GPU"):
            prefix, separator, setting = key.rpartition(".")
            alternative = setting.replace("resources", f"{name.lower()}s")
            raise ConfigError(
                f"{key} names {name}, which has a setting of its own. Set {prefix}{separator}{alternative}."
            )
        at_least(f"{key}.{name}", amount, 0.0)
