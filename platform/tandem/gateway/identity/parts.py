"""Identity of a gateway's clients: API keys, tokens of a provider, the audit log, and the middleware in front of all routes."""

from __future__ import annotations

import asyncio

from starlette.middleware import Middleware

from tandem.auth import KeyStore
from tandem.auth.audit_log import AuditLog
from tandem.auth.key_table import KeyTable
from tandem.auth.oidc import Provider, Tokens
from tandem.config.serving.oidc import OidcConfig
from tandem.gateway.identity.audit_writer import AuditWriter
from tandem.gateway.identity.authentication import Authentication
from tandem.registry import RegistryAddress


class Identity:
    """Keys, tokens and audit log for the checks of credentials, kept current in the background."""

    def __init__(self, address: RegistryAddress, oidc: OidcConfig | None = None) -> None:
        self.keys = KeyTable(KeyStore.at(address))
        self.audit = AuditWriter(AuditLog.at(address))
        self.provider = None if oidc is None else Provider(oidc)

    def middleware(self, *, require_keys: bool, admin: str | None, proxy_secret: str | None) -> Middleware:
        """`Authentication` with these keys; the parameters are those of `create_app`."""
        return Middleware(
            Authentication,
            keys=self.keys,
            tokens=None if self.provider is None else Tokens(self.provider.config, self.provider),
            required=require_keys or self.provider is not None,
            admin=admin,
            report=self.audit.refuse,
            proxy_secret=proxy_secret,
        )

    async def start(self) -> None:
        """Begin to follow; returns when the keys, and those of the provider, are known, or after the time that each waits."""
        self.audit.start()
        await asyncio.gather(self.keys.start(), *([] if self.provider is None else [self.provider.start()]))

    async def stop(self) -> None:
        """Stop following, and write the remaining entries of the audit log."""
        if self.provider is not None:
            await self.provider.stop()
        await self.keys.stop()
        await self.audit.stop()
