"""API keys, tokens of OIDC providers, and the audit log: tenant, role, models and limits of the callers of an app."""

from tandem.auth.keys import ApiKey, KeyStore, NewKey
from tandem.auth.principal import Limits, Principal, Role

__all__ = ["ApiKey", "KeyStore", "Limits", "NewKey", "Principal", "Role"]
