"""Secrets of replicas: references are resolved on the node, and their values are shown nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.secret_values import redact, resolve_references, without_references


def test_references_are_resolved_in_the_process_and_handed_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").write_text("hf_secret\n")
    monkeypatch.setenv("NODE_TOKEN", "node-secret")
    for name in ("A", "B", "C", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    env = {"A": "env:NODE_TOKEN", "B": f"file:{tmp_path}/hf", "C": "file:///not/a/reference", "HF_TOKEN": "given"}
    assert without_references(env) == {"C": "file:///not/a/reference", "HF_TOKEN": "given"}
    assert set(resolve_references(env)) == {"node-secret", "hf_secret", "given"}
    assert (os.environ["A"], os.environ["B"]) == ("node-secret", "hf_secret")
    assert "C" not in os.environ


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("env:MISSING", "is env:MISSING, and MISSING is not set on this node"),
        ("file:/nowhere", "cannot be read on this node: No such file"),
    ],
)
def test_a_reference_to_nothing_is_told_without_starting(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MISSING", raising=False)
    with pytest.raises(ConfigError, match=said):
        resolve_references({"X": value})


def test_secrets_and_passwords_in_urls_are_hidden() -> None:
    text = "args: {'hf_token': 'hf_secret'} postgresql://ann:pass@db:5432/x http://host:80/a"
    shown = redact(text, ("hf_secret",))
    assert shown == "args: {'hf_token': '***'} postgresql://ann:***@db:5432/x http://host:80/a"
