"""Headers for browsers: `x-content-type-options` on every response, and CORS for the origins that the config lists.

Pure ASGI, so that streams pass through unchanged. Without `gateway.cors_origins` no response has a CORS header, and browsers keep
pages of other origins from reading any.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOSNIFF = (b"x-content-type-options", b"nosniff")
PREFLIGHT_S = 600
"""Seconds for which a browser may keep the answer to a preflight request."""
EXPOSED_HEADERS = ("request-id", "x-request-id", "retry-after", "server-timing", "x-tandem-warning", "x-tandem-replica")
"""Response headers that a page may read."""


class ResponseHeaders:
    """Adds the headers that every response has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), NOSNIFF]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def browser_middleware(origins: tuple[str, ...]) -> list[Middleware]:
    """The middleware, outermost first. A preflight request carries no key, so it is answered before keys are checked."""
    middleware = [Middleware(ResponseHeaders)]
    if origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            # SDKs send many of their own. Cookies are never read here, so no header can borrow a user's rights.
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
            max_age=PREFLIGHT_S,
        )
        middleware.append(cors)
    return middleware
