"""Checks of JSONL contents, line by line and in bounded memory: examples for training, requests of a batch. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.files.checks.batch import check_batch
from tandem.files.checks.report import Finding, Report
from tandem.files.checks.training import check_training
from tandem.files.records import Purpose

__all__ = ["Finding", "Report", "check_batch", "check_content", "check_training"]


def check_content(purpose: Purpose, chunks: Iterable[bytes], endpoint: str | None = None) -> Report:
    """The report on a content that comes in chunks; purposes without a format have no problems. `endpoint`: see `check_batch`."""
    match purpose:
        case Purpose.FINE_TUNE:
            return check_training(chunks)
        case Purpose.BATCH:
            return check_batch(chunks, endpoint)
        case _:
            return Report(num_lines=0, num_rows=0)
