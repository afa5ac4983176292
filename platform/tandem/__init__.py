"""Tandem trains LLMs and serves them on one Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.sdk.app_client import Client
    from tandem.sdk.async_app_client import AsyncClient
    from tandem.sdk.batch import run_batch
    from tandem.sdk.client import SamplingParams
    from tandem.sdk.keys import api_key
    from tandem.sdk.llm import LLM
    from tandem.sdk.session import Session, recipe

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "LLM", "SamplingParams", "Session", "__version__", "api_key", "recipe", "run_batch"]

_HOMES = {
    "AsyncClient": "sdk.async_app_client",
    "Client": "sdk.app_client",
    "LLM": "sdk.llm",
    "SamplingParams": "sdk.client",
    "Session": "sdk.session",
    "api_key": "sdk.keys",
    "recipe": "sdk.session",
    "run_batch": "sdk.batch",
}


def __getattr__(name: str) -> Any:
    """Load what is public at its first use: importing a part of the package must not import all of it."""
    if name == "errors":
        return importlib.import_module("tandem.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(f"tandem.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
