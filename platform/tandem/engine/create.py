"""Creation of an engine, and validation of its arguments before any replica starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.engine.engines import find_engine
from tandem.engine.protocol import Engine
from tandem.engine.spec import EngineSpec
from tandem.engine.validation_cache import is_validated, mark_validated
from tandem.errors import ConfigError
from tandem.registry.hub import restore


def create_engine(spec: EngineSpec) -> Engine:
    """The engine, not started. ConfigError if it does not take its arguments."""
    if spec.path:
        # A model of the hub, on a node whose home is not the one where it was downloaded.
        restore(Path(spec.path))
    return find_engine(spec.kind).create(spec)


def check_engine_args(*specs: EngineSpec) -> None:
    """Have the engines validate their arguments, unless they have before. Raises ConfigError with the first error."""
    unvalidated = [spec for spec in specs if not is_validated(spec)]
    for spec, error in zip(unvalidated, validation_errors(unvalidated), strict=True):
        if error is not None:
            raise ConfigError(error)
        mark_validated(spec)


def validation_errors(specs: Sequence[EngineSpec]) -> list[str | None]:
    """The error in each spec's arguments (the key, with the nearest name or the engine's message); None if there is none."""
    all_errors: list[str | None] = [None] * len(specs)
    for kind in {spec.kind for spec in specs}:
        indices = [index for index, spec in enumerate(specs) if spec.kind == kind]
        errors = find_engine(kind).validate([specs[index] for index in indices])
        for index, error in zip(indices, errors, strict=True):
            all_errors[index] = error
    return all_errors
