"""Result of a content check: findings by line, counts. Plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

MOST_FINDINGS = 100
"""Findings that a report keeps; more are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem."""

    code: str
    """As in the errors of OpenAI's batches, such as `invalid_json_line`."""
    message: str
    line: int | None = None
    """Number of the line, from 1; None: the file as a whole."""
    param: str | None = None
    """The field of the line."""

    def __str__(self) -> str:
        return self.message if self.line is None else f"Line {self.line}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All problems of a content; none: it is valid."""

    num_lines: int
    num_rows: int
    """Lines that are not blank: examples, or requests."""
    findings: tuple[Finding, ...] = ()
    """The first `MOST_FINDINGS`, in the order of lines."""
    num_findings: int = 0
    format: str | None = None
    """Of a file for training: `chat`, `completion` or `preference`."""
    models: Mapping[str, int] = field(default_factory=dict)
    """Of a batch: the models that its requests name, each with the first line that names it."""

    @property
    def is_valid(self) -> bool:
        """Whether there is no problem."""
        return not self.num_findings

    def summary(self) -> str:
        """The first problems as text."""
        shown = " ".join(map(str, self.findings[:3]))
        rest = self.num_findings - len(self.findings[:3])
        return f"{shown} There are {rest:,} more problems." if rest > 0 else shown

    def to_json(self) -> str:
        """JSON for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The report that `to_json` wrote."""
        value = json.loads(text)
        value["findings"] = tuple(Finding(**finding) for finding in value["findings"])
        return cls(**value)
