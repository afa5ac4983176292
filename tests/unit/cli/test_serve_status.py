"""`tandem serve status` shows every message whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem.cli import serve
from tandem.cli.serve import show_status
from tandem.cluster.local import Cluster
from tandem.config import ServeConfig
from tandem.errors import ClusterError
from tandem.sdk.serving import check_not_served, listener_url, served_models


def test_a_long_message_is_shown_whole_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "vLLM could not load /m: ValueError: " + "word " * 60 + "Its log is /h/logs/engine-m.log."
    message = f"A replica failed to start with exception. Retrying. Error:\ntrace\ntandem.errors.EngineError: {reason}"
    replica = {"state": "STARTING"}
    details = {"status": "DEPLOY_FAILED", "message": message, "replicas": [replica], "target_num_replicas": 1}
    show_status({"tandem": {"deployments": {"engine-m": details}}})
    out = capsys.readouterr().out
    assert f"engine-m: {reason}\n" in out and "trace" not in out and "0/1" in out


def test_an_empty_cluster_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_status({})
    assert capsys.readouterr().out == "Nothing is served on this cluster.\n"


DETAILS = {
    "http_options": {"host": "0.0.0.0", "port": 8123},
    "applications": {"tandem": {"deployments": {"engine-org~tiny": {}, "prefill-org~tiny": {}, "Gateway": {}}}},
}


def test_the_address_and_the_models_of_an_app_are_read_from_serves_details() -> None:
    assert served_models(DETAILS, "tandem") == ["org/tiny"] and served_models(DETAILS, "other") == []
    assert listener_url(DETAILS) == "http://127.0.0.1:8123/v1"
    assert listener_url(DETAILS, Cluster(dashboard_url="http://head.example:8265")) == "http://head.example:8123/v1"


def test_an_app_that_is_up_is_refused_with_its_address_its_models_and_the_command_that_changes_it() -> None:
    check_not_served(DETAILS, ServeConfig(app="other"))
    with pytest.raises(ClusterError, match=r"at http://127.0.0.1:8123/v1, with org/tiny. `tandem serve deploy MODEL`"):
        check_not_served(DETAILS, ServeConfig())


def test_status_tells_where_an_app_answers_and_what_it_serves(
    monkeypatch: pytest.MonkeyPatch, tandem_home: Path
) -> None:
    monkeypatch.setattr(serve, "connect", lambda: Cluster(dashboard_url="http://head.example:8265"))
    replica = {"status": "HEALTHY", "replicas": [{"state": "RUNNING"}], "target_num_replicas": 1}
    deployments = {"engine-org~tiny": replica}
    details = {**DETAILS, "applications": {"tandem": {"deployments": deployments}}}
    monkeypatch.setattr(serve, "serve_details", lambda cluster: details)
    result = CliRunner().invoke(serve.serve_app, ["status"], env={"COLUMNS": "200"})
    assert "tandem: http://head.example:8123/v1, models: org/tiny" in result.stdout
    values = json.loads(CliRunner().invoke(serve.serve_app, ["status", "--json"]).stdout)["tandem"]
    assert (values["url"], values["models"]) == ("http://head.example:8123/v1", ["org/tiny"])
    assert "deployments" in values
