"""Authentication: every request but those for health gets its principal from its API key or token, before its body is read.

Pure ASGI, around the whole app, so that a route that somebody adds is closed too.
"""

from __future__ import annotations

import hmac
from datetime import datetime
from typing import Protocol
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.auth.credentials import secret_of
from tandem.auth.key_table import KeyTable
from tandem.auth.oidc import KeysUnavailableError, TokenError, Tokens, is_token
from tandem.auth.principal import ANONYMOUS, Principal, Role
from tandem.auth.tenants import DEFAULT_TENANT
from tandem.gateway.accounting.access_log import add_log_fields
from tandem.gateway.dialect import dialect_of
from tandem.gateway.errors import ApiError, path_below
from tandem.gateway.identity.client_address import PROXY_SECRET
from tandem.ids import fingerprint
from tandem.serve.listen import is_loopback

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""Paths that are answered without a key."""
ADMIN = "/admin"
PROXY_HEADERS = {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}
"""Headers that proxies add."""
PRINCIPAL = "tandem.principal"
"""Key of a scope under which a request's principal is."""
OPERATOR = Principal(key_id="admin-token", tenant="", role=Role.ADMIN)
"""The principal of requests with TANDEM_ADMIN_TOKEN."""


class RefusedError(ApiError):
    """401 or 403 because of a request's credential, which the audit log counts."""

    by = ""
    """The id of a key that is valid and may not do this."""


class ReportRefusal(Protocol):
    """Called for each request that is refused because of its credential."""

    def __call__(self, scope: Scope, error: ApiError, *, by: str, secret: str | None) -> None:
        """`by`: the id of a valid key; `secret`: the credential in the request."""
        ...


class Authentication:
    """The app, behind a check of keys."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyTable,
        *,
        tokens: Tokens | None = None,
        required: bool,
        admin: str | None,
        report: ReportRefusal | None = None,
        proxy_secret: str | None = None,
    ) -> None:
        """`required`: whether keys are needed before the first one is made; `admin`: fingerprint of TANDEM_ADMIN_TOKEN.

        `tokens`: those of an OIDC provider, which are accepted beside keys. `report`: called for each refused credential.
        `proxy_secret`: by which requests of this node's HAProxy are known, for `client_address`.
        """
        self._app = app
        self._keys = keys
        self._tokens = tokens
        self._required = required
        self._admin = admin
        self._report = report
        self._proxy_secret = proxy_secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its principal; 401 without a valid key, 403 where its role does not suffice."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            path = path_below(scope)
            scope[PROXY_SECRET] = self._proxy_secret
            secret = secret_of(scope["headers"])
            try:
                principal = scope[PRINCIPAL] = self._authenticate(scope, path, secret)
                add_log_fields(scope, key_id=principal.key_id or None, tenant=principal.tenant or None)
            except ApiError as error:
                if isinstance(error, RefusedError) and error.by:
                    add_log_fields(scope, key_id=error.by)
                # A health check without a key is no refused attempt; one with a wrong key is.
                if (
                    self._report
                    and isinstance(error, RefusedError)
                    and (secret is not None or path not in PUBLIC_PATHS)
                ):
                    self._report(scope, error, by=error.by, secret=secret)
                if path not in PUBLIC_PATHS:
                    await error.response(dialect_of(path), scope)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope, path: str, secret: str | None) -> Principal:
        is_admin_path = path == ADMIN or path.startswith(f"{ADMIN}/")
        if secret and self._admin is not None and hmac.compare_digest(fingerprint(secret) or "", self._admin):
            return OPERATOR
        if self._tokens is not None and secret and is_token(secret):
            principal = token_principal(self._tokens, secret)
            if is_admin_path:
                check_admin(principal)
            return principal
        # Until the table has been loaded it is unknown whether there are keys.
        if not self._keys.loaded:
            message = "API keys could not be read from the database yet. Try again in 5 s."
            raise ApiError(503, message, code="keys_unavailable", headers={"Retry-After": "5"})
        if not self._required and not self._keys.has_keys:
            if is_admin_path:
                raise _no_admin_error() if self._admin is None else _invalid_key_error(secret, "the admin token")
            check_local(scope)
            return ANONYMOUS
        key_principal = self._keys.authenticate(secret or "")
        if key_principal is None:
            expired_at = self._keys.expired_at(secret or "")
            raise (
                _invalid_key_error(secret, "a valid API key") if expired_at is None else _expired_key_error(expired_at)
            )
        if is_admin_path:
            check_admin(key_principal)
        return key_principal


def token_principal(tokens: Tokens, token: str) -> Principal:
    """The principal of a token; ApiError 401 if it is not accepted, 503 while the provider's keys are being fetched."""
    try:
        return tokens.authenticate(token)
    except TokenError as error:
        raise RefusedError(
            401,
            f"The token is not accepted: {error}.",
            code="invalid_token",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        ) from None
    except KeysUnavailableError:
        message = (
            "The token's signature cannot be checked yet: the provider's keys are being fetched. Try again in 2 s."
        )
        raise ApiError(503, message, code="keys_unavailable", headers={"Retry-After": "2"}) from None


def principal_of(scope: Scope) -> Principal:
    """The principal of a request that has passed `Authentication`."""
    principal = scope[PRINCIPAL]
    assert isinstance(principal, Principal)
    return principal


def tenant_of(principal: Principal) -> str:
    """The tenant that a caller's files, answers and jobs belong to, its own for admins too; without a key the default one."""
    return principal.tenant or DEFAULT_TENANT


def check_admin(principal: Principal) -> None:
    """ApiError 403 for other roles than admin."""
    if not principal.role.includes(Role.ADMIN):
        error = RefusedError(
            403,
            f"The key {principal.key_id} has the role {principal.role}; admin routes need the role admin.",
            code="insufficient_permissions",
        )
        error.by = principal.key_id
        raise error


def check_local(scope: Scope) -> None:
    """ApiError 403 unless a request without a key names this machine as its host, and no proxy as its way.

    A web page whose name was made to mean 127.0.0.1 could else use the app from a browser on this machine, and a proxy on this
    machine would open it to others.
    """
    headers = dict(scope["headers"])
    # Browsers send the host of the URL.
    host = urlsplit(f"//{headers.get(b'host', b'localhost').decode('latin-1')}").hostname or ""
    if is_loopback(host) and not PROXY_HEADERS & set(headers):
        return
    raise RefusedError(
        403,
        "This app has no API key yet, so it answers requests to localhost only, and none that a proxy passes on. Make a key with "
        "`tandem keys create NAME`.",
        code="key_required",
    )


def _invalid_key_error(secret: str | None, expected: str) -> ApiError:
    reason = "The request has no API key" if secret is None else f"What the request was sent with is not {expected}"
    return RefusedError(
        401,
        f"{reason}. Send one as `Authorization: Bearer ...` or `x-api-key`; `tandem keys create NAME` makes one, which is "
        "accepted within 5 s.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _expired_key_error(expired_at: datetime) -> ApiError:
    return RefusedError(
        401,
        f"The API key expired at {expired_at:%Y-%m-%d %H:%M:%S} UTC. Ask whoever manages keys for a new one.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _no_admin_error() -> ApiError:
    return RefusedError(
        403,
        "The admin routes are closed: there is no API key yet, and the app was started without TANDEM_ADMIN_TOKEN. Make a key "
        "with `tandem keys create NAME --role admin`.",
        code="key_required",
    )
