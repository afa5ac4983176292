"""Progress and result of a batch run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    rows: int
    """Of the input."""
    done: int
    """Of these, rows that are published, those of earlier starts and those that were refused among them."""
    failed: int
    """Rows without an answer, as far as this start knows."""
    found: int = 0
    """Rows that an earlier start had published."""
    tokens: int = 0
    """Generated since this start."""
    answering_s: float = 0.0
    """What this start has taken for its rows, without the starts of engines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How a run ended."""

    rows: int
    answered: int
    failed: int
    found: int
    """Rows that an earlier start had published."""
    results: str
    errors: str
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    answering_s: float = 0.0
    """From the first row that an engine was asked to the last that was published, without the starts of engines."""
    files_s: float = 0.0
    """What making the two files of all chunks took then."""
