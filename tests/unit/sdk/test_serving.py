"""What `tandem serve` asks of a cluster."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading

import pytest

from tandem.cluster.dashboard import ask_dashboard
from tandem.cluster.local import Cluster
from tandem.errors import ClusterError
from tandem.sdk import serving


def test_a_dashboard_that_closes_connections_is_asked_again_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ask_dashboard", functools.partial(ask_dashboard, within_s=1.2))
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    accepted.append(connection)
                    connection.close()

        threading.Thread(target=close_all, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError, match="dashboard at .* does not answer"):
            serving.serve_details(Cluster(dashboard_url=url, address="127.0.0.1:1"))
    assert len(accepted) >= 2
