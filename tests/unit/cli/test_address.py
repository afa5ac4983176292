"""Where commands find the app of a home that are given no address."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.chat import chat
from tandem.errors import ConfigError
from tandem.sdk.address import find_api_url


@pytest.fixture(autouse=True)
def nothing_is_set(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANDEM_API_URL", "RAY_ADDRESS", "TANDEM_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_an_address_without_a_path_gets_v1_and_one_with_a_path_stays() -> None:
    assert find_api_url("http://host:8123") == "http://host:8123/v1"
    assert find_api_url("http://host:8123/") == "http://host:8123/v1"
    assert find_api_url("http://host:8123/v1/") == "http://host:8123/v1"
    assert find_api_url("https://host/my-app/openai") == "https://host/my-app/openai"


def test_the_variable_counts_before_the_home_and_the_argument_before_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_URL", "http://variable:1/v1")
    assert find_api_url() == "http://variable:1/v1"
    assert find_api_url("http://argument:2") == "http://argument:2/v1"


def test_where_nothing_is_up_it_is_the_port_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_api_url() == "http://127.0.0.1:8000/v1"
    monkeypatch.setenv("TANDEM_PORT", "8123")
    assert find_api_url() == "http://127.0.0.1:8123/v1"


def test_a_chat_with_another_path_says_what_the_address_should_be(server) -> None:
    root = server.url.removesuffix("/v1")
    with pytest.raises(ConfigError, match=r"/other is not OpenAI's API: it answered 404 .* usually ends with /v1"):
        chat("base", f"{root}/other", "right-key", question="hi")


def test_a_chat_with_an_address_without_v1_works(server, capsys: pytest.CaptureFixture[str]) -> None:
    chat("base", server.url.removesuffix("/v1"), "right-key", question="hi")
    assert capsys.readouterr().out == "base heard hi \n"
