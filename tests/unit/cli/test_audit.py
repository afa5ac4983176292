"""`tandem audit`: entries as a table or JSON, from a time on."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tandem.auth.audit_log import AuditLog
from tandem.cli.audit import audit_command, changed, moment
from tandem.db.audit import Change
from tandem.errors import ConfigError

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12h", NOW - timedelta(hours=12)),
        ("2026-01-01", datetime(2026, 1, 1, tzinfo=UTC)),
        ("2026-01-01T01:00:00+01:00", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_since_is_a_duration_or_a_time(text: str, expected: datetime) -> None:
    assert moment(text, NOW) == expected


@pytest.mark.parametrize("text", ["soon", "", "999999d", "2026-13-01"])
def test_another_since_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Give"):
        moment(text, NOW)


def test_a_change_is_shown_as_what_differs() -> None:
    assert (
        changed({"promoted": "red@1", "pinned": []}, {"promoted": "red@2", "pinned": []}) == "promoted: red@1 -> red@2"
    )
    assert changed(None, {"count": 3, "hint": None}) == "count: 3"


def test_entries_are_listed_newest_first(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit_command()
    assert "no such entry" in capsys.readouterr().out
    old = datetime.now(UTC) - timedelta(days=2)
    AuditLog.open().append(
        [
            Change(by="ann@host", action="keys.create", target="key_1", at=old),
            Change(by="key_1", action="adapters.pin", target="red", address="10.0.0.1"),
        ]
    )
    audit_command(as_json=True)
    assert [entry["target"] for entry in json.loads(capsys.readouterr().out)] == ["red", "key_1"]
    audit_command(since="1d", as_json=True)
    assert [entry["target"] for entry in json.loads(capsys.readouterr().out)] == ["red"]
    audit_command(limit=1)
    shown = capsys.readouterr().out
    assert "adapters.pin" in shown and "keys.create" not in shown and "--after 2" in shown
