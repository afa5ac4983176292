"""API keys: who may use an app, as which tenant and in which role, and within which limits."""

from tandem.auth.keys import ApiKey, KeyStore, NewKey
from tandem.auth.principal import Limits, Principal, Role

__all__ = ["ApiKey", "KeyStore", "Limits", "NewKey", "Principal", "Role"]
