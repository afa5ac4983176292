"""Puts an app on the cluster this process is connected to, over the one that runs there under its name, and takes it away.

What differs is replaced: new replicas come before old ones go, and old ones go when their streams have ended (ADR 0017).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from tandem.errors import EngineError
from tandem.serve.app import GATEWAY_NAME

LOOK_S = 0.2
LAST_BYTES_S = 1.0
"""How long the last bytes of an engine may take to their clients."""


def deploy(app: serve.Application, name: str, *, route_prefix: str = "/") -> None:
    """Deploy and wait until every new replica is up. EngineError with the reason if one cannot; old ones then stay."""
    try:
        serve.run(app, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        raise EngineError(f"{name} did not start: {why(name) or error}") from error


def drain(name: str, timeout_s: float) -> bool:
    """Take an app away once its engines have answered what they had begun; False if they had not within `timeout_s`."""
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        app = serve.status().applications.get(name)
        # A gateway stays reachable for half a minute, whether anybody calls it or not: it is not waited for.
        if app is None or not working(app.deployments):
            time.sleep(LAST_BYTES_S)
            return True
        time.sleep(LOOK_S)
    return False


def working(deployments: Mapping[str, Any]) -> bool:
    """Whether an app has replicas that may still be answering."""
    return any(
        sum(d.replica_states.values()) for key, d in deployments.items() if key not in ("Directory", GATEWAY_NAME)
    )


def why(name: str) -> str:
    """What Serve says of an app that is not as it should be."""
    app = serve.status().applications.get(name)
    if app is None:
        return ""
    messages = [deployment.message for deployment in app.deployments.values() if deployment.message]
    return "\n".join(messages) or (app.message if app.status != ApplicationStatus.RUNNING else "")
