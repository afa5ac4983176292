"""`tandem serve status` shows every message whole."""

from __future__ import annotations

import pytest

from tandem.cli.serve import show_status


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
