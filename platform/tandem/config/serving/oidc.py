"""Config of tokens: the OIDC provider that signs them, and what their claims mean here."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tandem.config import check
from tandem.errors import ConfigError

ROLES = ("admin", "trainer", "user")
"""The values of `auth.Role`, the most powerful first."""
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OidcConfig:
    """Tokens (JWT) of an OIDC provider, accepted beside API keys: signed by RS256, RS384, RS512, PS256, PS384, PS512, ES256 or
    EdDSA.
    """

    issuer: str
    """`iss` of the tokens, letter for letter; an https URL."""
    audience: str
    """`aud` of the tokens, or one of its values: this app's name at the provider."""
    jwks_url: str | None = None
    """URL of the provider's public keys. Unset: the one in `ISSUER/.well-known/openid-configuration`."""
    tenant_claim: str | None = None
    """Claim with the tenant, such as `org` or `a.b` for a claim inside another; tokens without it are refused. Unset: all tokens
    are of the tenant `default`."""
    role_claim: str | None = None
    """Claim with the role, or with a list of roles or groups, of which the most powerful counts. Unset: `default_role`."""
    roles: dict[str, str] = field(default_factory=dict)
    """Role (admin, trainer, user) of each value of `role_claim`, such as `{llm-admins: admin}`. Empty: the values are roles."""
    default_role: str | None = "user"
    """Role of tokens without any value that is a role. null: they are refused."""
    models_claim: str | None = None
    """Claim with the models and adapters that the token may use, a list or a text with spaces between them; tokens without it
    are refused. Unset: all."""
    leeway_s: int = 30
    """Seconds by which clocks may differ."""

    def __post_init__(self) -> None:
        _check_url("gateway.oidc.issuer", self.issuer)
        if self.jwks_url is not None:
            _check_url("gateway.oidc.jwks_url", self.jwks_url)
        if not self.audience:
            raise ConfigError("gateway.oidc.audience is empty; it must be the `aud` of the tokens.")
        for key in ("tenant_claim", "role_claim", "models_claim"):
            if getattr(self, key) == "":
                raise ConfigError(f"gateway.oidc.{key} is empty. Name a claim, or leave it out.")
        for value, role in self.roles.items():
            check.one_of(f"gateway.oidc.roles.{value}", role, ROLES)
        if self.roles and self.role_claim is None:
            raise ConfigError("gateway.oidc.roles is set and role_claim is not. Name the claim that has these values.")
        if self.default_role is not None:
            check.one_of("gateway.oidc.default_role", self.default_role, ROLES)
        elif self.role_claim is None:
            raise ConfigError("gateway.oidc.default_role is null and role_claim unset: no token would be accepted.")
        check.between("gateway.oidc.leeway_s", self.leeway_s, 0, 300)


def check_provider_url(key: str, url: str) -> None:
    """ConfigError unless a URL is https, or http on this machine: over plain http an attacker could replace the keys."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname in LOCAL:
        return
    raise ConfigError(f"{key} is {url[:200]!r}; it must be an https URL (http only on this machine).")


def _check_url(key: str, url: str) -> None:
    try:
        check_provider_url(key, url)
        _ = urlsplit(url).port
    except ValueError as error:
        raise ConfigError(f"{key} is no URL: {error}.") from error
