"""`tandem models` on a real registry, by its own command line."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from small_folders import small_adapter, small_model
from typer.testing import CliRunner

from tandem.cli.models import ago, models_app
from tandem.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with two versions of a model, and an adapter of the first."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TANDEM_DATABASE_URL", raising=False)
    registry = Registry.open()
    for version in (1, 2):
        folder = small_model(tmp_path / f"base-{version}", str(version))
        registry.register_model("base", folder, lineage={"job": f"base-{version}", "loss": 2.5, "steps": [1, 2]})
    registry.register_adapter("helper", small_adapter(tmp_path / "helper"), base="base@1")
    return registry


def run(*args, **kwargs):
    """Exit status, stdout and stderr of `tandem models ARGS`."""
    result = CliRunner().invoke(models_app, list(args), env={"COLUMNS": "200"}, **kwargs)
    return result.exit_code, result.stdout, result.stderr


def test_ls_shows_the_newest_of_each_name(registry):
    status, out, _ = run("ls")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["NAME", "VERSION", "KIND", "BASE", "LOSS", "CREATED"]
    assert rows[1] == ["base", "2", "model", "-", "2.500", "just", "now"]
    assert rows[2] == ["helper", "1", "LoRA,", "rank", "16", "base@1", "-", "just", "now"]


def test_ls_as_json_holds_all_versions_on_demand(registry):
    status, out, _ = run("ls", "--all", "--kind", "model", "--json")
    assert status == 0
    first, second = json.loads(out)
    assert (first["id"], second["id"]) == ("base@1", "base@2")
    assert first["lineage"] == {"job": "base-1", "loss": 2.5, "steps": [1, 2]}
    assert datetime.fromisoformat(first["created_at"]).tzinfo is not None


def test_ls_of_an_empty_registry_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "empty"))
    status, out, _ = run("ls")
    assert status == 0
    assert "tandem quickstart" in out
    assert json.loads(run("ls", "--json")[1]) == []


def test_show_tells_base_lineage_and_adapters(registry):
    status, out, _ = run("show", "base@1")
    assert status == 0
    for text in ("base@1", "helper@1", "base-1", "512", registry.resolve("base@1").digest):
        assert text in out
    assert json.loads(run("show", "helper", "--json")[1])["base"] == "base@1"


def test_show_leaves_out_what_is_not_known(registry):
    folder = small_model(registry.resolve("base").path.parent / "other", "other")
    registry.register_model("other", folder, lineage={"job": "a-job", "evaluation": None})
    out = run("show", "other")[1]
    assert "a-job" in out and "evaluation" not in out and "null" not in out


def test_show_tells_the_parsers_of_a_model_and_why(registry):
    folder = registry.resolve("base@1").path
    for name in ("base@1", "helper"):
        assert "none (the model has no chat template)" in run("show", name)[1]
    (folder / "chat_template.jinja").write_text("{% if tools %}<tool_call>{% endif %}")
    for name in ("base@1", "helper"):
        assert "hermes (<tool_call> in the chat template)" in run("show", name)[1]
    assert json.loads(run("show", "base@1", "--json")[1])["tool_parser"].startswith("hermes")


def test_show_says_when_the_files_are_gone(registry):
    shutil.rmtree(registry.resolve("helper").path)
    assert "(gone)" in run("show", "helper")[1]


def test_an_unknown_name_is_one_line_with_the_nearest_and_a_status(registry):
    for command in (["show", "helpr"], ["rm", "helpr", "--yes"]):
        status, out, err = run(*command)
        assert status == 1
        assert out == ""
        assert "Did you mean 'helper'?" in err


def test_rm_asks_first_and_forgets_on_yes(registry):
    status, out, _ = run("rm", "helper", input="n\n")
    assert status == 1
    assert registry.resolve("helper").id == "helper@1"
    status, out, _ = run("rm", "helper", input="y\n")
    assert status == 0
    assert "Forget every version of helper?" in out
    assert "Forgot helper@1" in out
    assert [r.name for r in registry.list()] == ["base"]


def test_rm_refuses_a_base_that_is_needed(registry):
    status, _, err = run("rm", "base", "--yes")
    assert status == 1
    assert "base of helper@1" in err
    status, out, _ = run("rm", "base@2", "--yes", "--json")
    assert status == 0
    assert [each["id"] for each in json.loads(out)] == ["base@2"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "just now"), (59, "just now"), (60, "1 minute ago"), (7200, "2 hours ago"), (90_000, "1 day ago")],
)
def test_ago_uses_the_largest_unit_that_fits(seconds, said):
    now = datetime.now(UTC)
    assert ago(now - timedelta(seconds=seconds), now) == said


def test_a_model_of_the_hub_is_pulled_listed_and_shown_with_its_commit(hub, tmp_path):
    commit = hub.model("org/tiny", {p.name: p.read_bytes() for p in small_model(tmp_path / "tiny").iterdir()}).refs[
        "main"
    ]
    status, out, err = run("pull", "org/tiny")
    assert status == 0, err
    assert f"org/tiny@1 is commit {commit[:12]} of org/tiny" in out and "tandem serve up org/tiny" in out
    rows = [line.split() for line in run("ls")[1].splitlines()]
    assert rows == [
        ["NAME", "VERSION", "KIND", "BASE", "COMMIT", "LOSS", "CREATED"],
        ["org/tiny", "1", "model", "-", commit[:8], "-", "just", "now"],
    ]
    status, out, _ = run("show", "org/tiny")
    shown = dict(line.strip().split(maxsplit=1) for line in out.splitlines()[1:])
    assert (shown["hub"], shown["revision"], shown["commit"]) == ("org/tiny", "main", commit)
    assert json.loads(run("pull", "org/tiny@main", "--json")[1])["lineage"]["commit"] == commit
    assert len(hub.downloads()) == 2
    status, _, err = run("pull", "tiny")
    assert status == 2 and "'tiny' names no model of the hub. Its form is org/name" in err
    assert run("rm", "org/tiny@1", "--yes")[0] == 0
    assert json.loads(run("pull", "org/tiny", "--json")[1])["id"] == "org/tiny@2"
    assert len(hub.downloads()) == 2
