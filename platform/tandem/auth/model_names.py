"""Check of a key's list of models against the names that exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem.errors import UnknownModelError, did_you_mean
from tandem.ids import split_version
from tandem.registry import Registry

MAX_CHECKED = 50
"""Names of a list that are looked up."""


def unregistered(registry: Registry, models: Sequence[str], served: Iterable[str] = ()) -> list[str]:
    """A warning for each name that is neither registered nor among those `served`, with the nearest that is.

    Such a name is no error: a key may be made before its model. Of a long list the first `MAX_CHECKED` names are looked up.
    """
    served_names = set(served)
    return [
        warning
        for name in models[:MAX_CHECKED]
        if name not in served_names and (warning := _warning(registry, name, served_names))
    ]


def _warning(registry: Registry, name: str, served: set[str]) -> str | None:
    try:
        registry.versions(name)
    except UnknownModelError:
        suggestion = did_you_mean(name, [*served, *registry.near(split_version(name)[0])])
        return f"No model or adapter {name!r} is registered; until one is, the key cannot use it.{suggestion}"
    return None
