"""Address of a served app: given, from the environment, or of the app of this home."""

from __future__ import annotations

from urllib.parse import urlsplit

from tandem.errors import TandemError
from tandem.settings import settings

DEFAULT_PORT_URL = "http://127.0.0.1:{port}/v1"


def find_api_url(given: str | None = None) -> str:
    """The base URL for clients of OpenAI's API.

    `given`, else TANDEM_API_URL, else that of the app on RAY_ADDRESS's cluster or in this home, else TANDEM_PORT on this machine.
    A URL without a path gets `/v1`.
    """
    url = given or settings().api_url or _of_app() or DEFAULT_PORT_URL.format(port=settings().port)
    return url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")


def _of_app() -> str | None:
    # Imported here: a client of a server elsewhere needs none of it.
    from tandem.cluster.local import connect, recorded_cluster

    if settings().ray_address is None and recorded_cluster() is None:
        return None
    from tandem.config import ServeConfig
    from tandem.sdk.serving import app_url

    try:
        cluster = connect()
        return app_url(cluster, ServeConfig().app) if cluster else None
    except (TandemError, ConnectionError, RuntimeError):  # the latter are Ray's, of a dashboard that does not answer
        return None
