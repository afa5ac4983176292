"""The environment: an empty variable is one that is not set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem import settings as environment
from tandem.errors import ConfigError
from tandem.settings import Settings, settings


def names() -> list[str]:
    fields = Settings.model_fields.items()
    return [
        str(field.validation_alias) if field.validation_alias else f"TANDEM_{name.upper()}" for name, field in fields
    ]


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All of them, set to nothing."""
    found = names()
    for name in found:
        monkeypatch.setenv(name, "")
    return found


def test_every_empty_variable_leaves_the_default(empty: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TANDEM_HOME" in empty and "RAY_ADDRESS" in empty
    with_empty = settings()
    for name in empty:
        monkeypatch.delenv(name)
    assert with_empty == settings()
    assert with_empty.root == (Path.home() / ".tandem").resolve()


def test_an_empty_variable_of_a_library_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    assert environment.variable("RAY_AUTH_TOKEN_PATH") is None
    environment.export({"RAY_AUTH_TOKEN_PATH": "/x"})
    assert environment.variable("RAY_AUTH_TOKEN_PATH") == "/x"


def test_children_do_not_get_empty_variables_of_ours_and_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANDEM_HOME", "RAY_ADDRESS", "VLLM_PORT", "SOMETHING"):
        monkeypatch.setenv(name, "")
    child = environment.child_environment({"RAY_AUTH_TOKEN": "x"})
    assert "TANDEM_HOME" not in child and "RAY_ADDRESS" not in child and "VLLM_PORT" not in child
    assert child["SOMETHING"] == "" and child["RAY_AUTH_TOKEN"] == "x"


def test_a_value_that_cannot_be_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_PORT", "abc")
    with pytest.raises(ConfigError, match=r"^TANDEM_PORT is 'abc': Input should be a valid integer"):
        settings()
