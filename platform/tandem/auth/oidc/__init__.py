"""Tokens of an OIDC provider: its public keys, checks of signatures and claims, and the principals of tokens."""

from tandem.auth.oidc.provider import Provider
from tandem.auth.oidc.tokens import KeysUnavailableError, TokenError, Tokens, is_token

__all__ = ["KeysUnavailableError", "Provider", "TokenError", "Tokens", "is_token"]
