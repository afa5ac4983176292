"""`tandem usage` and `tandem tenants`: tables, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest

from tandem.auth import KeyStore
from tandem.cli.tenants import limit_command, list_command
from tandem.cli.usage import usage_command
from tandem.usage import UsageCounts, UsageKey, UsageLabels, UsageStore


def test_usage_is_shown_by_the_columns_asked_for(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage_command()
    assert "No request was answered" in capsys.readouterr().out
    now = time.time()
    batch = {
        UsageKey.at(UsageLabels("key_1", "lab", "base@1", "red@1", "/v1/completions"), now): UsageCounts(3, 1200, 40),
        UsageKey.at(UsageLabels("key_2", "lab", "base@1", "", "/v1/completions"), now): UsageCounts(1, 5, 6),
    }
    UsageStore.open().add("w", 1, batch)
    usage_command(by="adapter, key_id", as_csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    told = [(row["adapter"], row["requests"], row["prompt_tokens"]) for row in rows]
    assert told == [("", "1", "5"), ("red@1", "3", "1200")]
    usage_command(by="tenant", as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["completion_tokens"] == 46
    usage_command(by="tenant", until="1d")
    assert "No request was answered" in capsys.readouterr().out
    usage_command()
    assert "1,200" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        usage_command(by="modle")


def test_a_tenants_limits_are_set_listed_and_removed(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KeyStore.open().create("ann", tenant="lab", by="test")
    limit_command("shop", ["requests_per_minute=5"])
    assert "requests_per_minute=5" in capsys.readouterr().out
    list_command(as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"tenant": "lab", "keys": 1, "limits": {}},
        {"tenant": "shop", "keys": 0, "limits": {"requests_per_minute": 5}},
    ]
    limit_command("shop")
    assert "no limits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        limit_command("Not valid")
