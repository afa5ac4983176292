"""`tandem adapters` on a real registry, by its own command line; a job's adapter too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_folders import small_adapter, small_model
from typer.testing import CliRunner

from tandem.auth.audit_log import AuditLog
from tandem.cli.adapters import adapters_app
from tandem.jobs.adapters import Adapters
from tandem.registry import Registry
from tandem.sdk.keys import operator


@pytest.fixture
def registry(tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with a base and two versions of `red`, the second a candidate."""
    monkeypatch.delenv("TANDEM_DATABASE_URL", raising=False)
    registry = Registry.open()
    registry.register_model("base", small_model(tmp_path / "base"))
    for number, flags in enumerate(([], ["--no-promote"])):
        folder = small_adapter(tmp_path / f"red-{number}", str(number))
        assert run("register", "red", str(folder), "--base", "base", *flags)[0] == 0
    return registry


def run(*args: str, **options: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `tandem adapters ARGS`."""
    result = CliRunner().invoke(adapters_app, list(args), env={"COLUMNS": "200"}, **options)
    return result.exit_code, result.stdout, result.stderr


def test_a_candidate_is_promoted_rolled_back_and_its_history_kept(registry: Registry) -> None:
    assert registry.resolve("red").id == "red@1"
    assert "red means red@2 now" in run("promote", "red@2")[1]
    assert "red means red@1 again" in run("roll-back", "red")[1]
    history = json.loads(run("history", "red", "--json")[1])
    assert [(each["id"], each["taken_back"]) for each in history] == [("red@2", True), ("red@1", False)]
    status, _, err = run("roll-back", "red")
    assert status == 1 and "only version of red" in err


def test_the_list_marks_what_is_pinned_and_comes_in_pages(registry: Registry) -> None:
    run("pin", "red@2")
    rows = json.loads(run("list", "--all", "--json")[1])
    assert [(row["id"], row["promoted"], row["pinned"]) for row in rows] == [
        ("red@1", True, False),
        ("red@2", False, True),
    ]
    _, out, _ = run("list", "--all", "--limit", "1")
    assert "red@1" in out and "red@2" not in out and "--after red@1" in out
    assert "red@2" in run("list", "--all", "--after", "red@1")[1]
    assert "pinned no more" in run("unpin", "red@2")[1] and "was not pinned" in run("unpin", "red@2")[1]


def test_every_column_of_the_list_has_a_header(registry: Registry) -> None:
    header, *rows = run("list", "--all")[1].splitlines()
    assert header.split() == ["ADAPTER", "BASE", "RANK", "STATUS", "CREATED"]
    assert "promoted" in rows[0]


def test_delete_asks_and_forgets_adapters_only(registry: Registry) -> None:
    status, out, _ = run("delete", "red", input="n\n")
    assert status == 1 and "Forget red@1, red@2?" in out and registry.resolve("red@2")
    # What does not exist is not asked about.
    status, out, err = run("delete", "rad", input="y\n")
    assert status == 1 and "Forget" not in out and "Did you mean 'red'" in err
    assert "Forgot red@2" in run("delete", "red@2", "--yes")[1]
    status, _, err = run("delete", "base", "--yes")
    assert status == 1 and "base@1 is a model, not an adapter" in err


def test_a_bad_adapter_is_one_message_with_its_reason(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "bad", modules_to_save=["lm_head"])
    status, out, err = run("register", "bad", str(folder), "--base", "base")
    assert (status, out) == (1, "") and "modules_to_save" in err


def test_a_finished_job_is_registered_by_its_id_with_its_base_and_lineage(
    registry: Registry, tandem_home: Path
) -> None:
    job = tandem_home / "jobs" / "tune-0123456789ab"
    small_adapter(job / "export", "of a job")
    (job / "config.yaml").write_text("name: tune\nsteps: 7\nlora: {rank: 16}\nmodel: {base: base@1}\ndata: {path: x}\n")
    end = {"event": "finished", "model": "tune@1", "base": "base@1", "loss": 1.5, "time": 0}
    (job / "events.jsonl").write_text(json.dumps(end) + "\n")
    record = Adapters(registry).register("blue", "tune-0123456789ab")
    assert (record.id, record.base) == ("blue@1", "base@1")
    assert record.lineage == {"job": job.name, "steps": 7, "loss": 1.5}
    status, _, err = run("register", "blue", "tune-nothing")
    assert status == 1 and "is no folder and no URI, and no job" in err


def test_where_without_the_admin_token_says_that_it_is_missing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TANDEM_ADMIN_TOKEN", raising=False)
    status, _, err = run("where")
    assert status == 2 and "Set TANDEM_API_KEY to a key with that role" in err


def test_where_says_what_to_set_if_no_gateway_answers(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("TANDEM_ADMIN_TOKEN", "operator")
    status, _, err = run("where")
    assert status == 1 and "TANDEM_API_URL" in err


def test_each_change_is_in_the_audit_log_with_who_made_it_and_what_the_name_meant(registry: Registry) -> None:
    for words in (
        ["promote", "red@2"],
        ["roll-back", "red"],
        ["pin", "red"],
        ["unpin", "red"],
        ["delete", "red@2", "-y"],
    ):
        assert run(*words)[0] == 0
    assert run("promote", "red@9")[0] == 1
    entries = AuditLog.at(registry.address).page()
    assert [(each.action, each.target) for each in reversed(entries)] == [
        ("adapters.register", "red"),
        ("adapters.register", "red"),
        ("adapters.promote", "red@2"),
        ("adapters.roll_back", "red"),
        ("adapters.pin", "red"),
        ("adapters.unpin", "red"),
        ("adapters.delete", "red@2"),
    ]
    promoted = entries[4]
    assert promoted.by == operator() and promoted.address is None
    assert promoted.before is not None and promoted.after is not None
    assert (promoted.before["promoted"], promoted.after["promoted"]) == ("red@1", "red@2")
    registered, deleted = entries[-1].after, entries[0].after
    assert registered is not None and registered["id"] == "red@1" and registered["base"] == "base@1"
    assert registered["source"] and registered["digest"]
    assert deleted is not None and deleted["deleted"] == ["red@2"]
