"""Tandem trains LLMs and serves them on one Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.cli.session import Session, recipe

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "recipe"]


def __getattr__(name: str) -> Any:
    """Load what is public at its first use: importing a part of the package must not import all of it."""
    if name in ("Session", "recipe"):
        from tandem.cli import session

        return getattr(session, name)
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
