"""Requests to a dashboard that closes connections."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
import requests

from tandem.cluster import dashboard
from tandem.cluster.dashboard import ask_dashboard
from tandem.errors import ClusterError


class Closing(http.server.BaseHTTPRequestHandler):
    """Closes the first two connections without an answer."""

    seen = 0

    def do_GET(self) -> None:
        type(self).seen += 1
        if self.seen > 2:
            self.send_response(204)
            self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(dashboard, "PAUSE_S", 0.01)
    Closing.seen = 0
    with http.server.HTTPServer(("127.0.0.1", 0), Closing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_request_whose_connection_is_closed_is_sent_again(url: str) -> None:
    assert ask_dashboard(url, lambda: requests.get(url, timeout=5).status_code) == 204
    assert Closing.seen == 3


def test_a_dashboard_that_does_not_answer_in_time_is_named(url: str) -> None:
    with pytest.raises(ClusterError, match=f"dashboard at {url} does not answer"):
        ask_dashboard(url, lambda: requests.get(url, timeout=5).status_code, within_s=0)


def test_an_answer_that_refuses_is_not_asked_for_again(url: str) -> None:
    calls = []

    def refused() -> None:
        calls.append(1)
        raise RuntimeError("no such job")

    with pytest.raises(RuntimeError, match="no such job"):
        ask_dashboard(url, refused)
    assert len(calls) == 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_dashboard_that_is_starting_is_asked_again(url: str, status: int) -> None:
    answers = iter([status, status])

    def request() -> str:
        # As ray.dashboard.modules.dashboard_sdk raises it.
        if (code := next(answers, None)) is not None:
            text = "500 Internal Server Error\n\nServer got itself in trouble" if code == 500 else "Unavailable"
            raise RuntimeError(f"Request failed with status code {code}: {text}.")
        return "ready"

    assert ask_dashboard(url, request) == "ready"


def test_a_500_that_answers_the_request_is_not_asked_for_again(url: str) -> None:
    calls = []

    def failed() -> None:
        calls.append(1)
        raise RuntimeError("Request failed with status code 500: Traceback (most recent call last) ValueError: exists.")

    with pytest.raises(RuntimeError, match="exists"):
        ask_dashboard(url, failed)
    assert len(calls) == 1
