"""What the bar of a run says."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tandem.batch.run import Progress
from tandem.sdk import batch


def test_speed_and_time_left_are_those_of_the_engines_once_they_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(batch, "console", Console(file=out, width=100, color_system=None))
    prepared: Any = SimpleNamespace(survey=SimpleNamespace(rows=1000))
    with batch._Bar(prepared) as bar:
        bar.tell(Progress(rows=1000, done=500, failed=0))
        bar.tell(Progress(rows=1000, done=750, failed=0, tokens=2500, answering_s=25.0))
    assert "750 of 1,000 rows  100 tok/s  25 s left" in out.getvalue()
