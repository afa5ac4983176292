"""API keys from Python and the command line: in the registry of this home, without an app or a cluster."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.markup import escape

from tandem.auth import ApiKey, KeyStore, Limits, NewKey, Role
from tandem.auth.model_names import unregistered
from tandem.auth.tenants import DEFAULT_TENANT
from tandem.errors import ConfigError
from tandem.registry import Registry
from tandem.sdk.console import errors
from tandem.settings import settings
from tandem.storage import write_atomic

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# Inside the class, `list` is a method.
ApiKeys = list[ApiKey]


class Keys:
    """Create, list, rotate and revoke keys; gateways that are up follow within 5 seconds.

    keys = tandem.Session().keys
    secret = keys.create("notebook", models=["my-model"], expires_in="12h").secret
    """

    def __init__(self, store: KeyStore, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    @classmethod
    def open(cls) -> Keys:
        """The keys of the registry that the settings name."""
        return cls(KeyStore.open(), Registry.open())

    def create(
        self,
        name: str,
        *,
        tenant: str = DEFAULT_TENANT,
        role: Role | str = Role.USER,
        models: Sequence[str] = (),
        limits: Limits | None = None,
        expires_in: timedelta | str | None = None,
    ) -> NewKey:
        """Make a key; its `secret` can be read here and nowhere else.

        `models`: models and adapters that it may use; empty: all. `expires_in`: a time such as "12h"; None: never. A name that is
        not registered is told, with the nearest one. AuthError or ConfigError for values that no key can have.
        """
        if role not in list(Role):
            raise ConfigError(f"The role is {role!r}; roles are {', '.join(Role)}.")
        lifetime = duration(expires_in) if isinstance(expires_in, str) else expires_in
        # Before the key is made: after it an error would lose the secret.
        warnings = unregistered(self._registry, models)
        new = self._store.create(
            name, tenant=tenant, role=Role(role), models=models, limits=limits, expires_in=lifetime, by=operator()
        )
        for warning in warnings:
            errors.print(f"[yellow]Warning[/] {escape(warning)}", soft_wrap=True)
        return new

    def list(self, *, tenant: str | None = None, every: bool = False) -> ApiKeys:
        """Active keys, or `every` key, oldest first; `tenant`: of one tenant only."""
        return self._store.list(tenant=tenant, every=every)

    def get(self, id_or_name: str) -> ApiKey:
        """One key, by its id, or by its name if one active key has it. UnknownKeyError if there is none."""
        return self._store.get(id_or_name)

    def rotate(self, id_or_name: str, *, overlap: timedelta | str = "24h") -> NewKey:
        """A new key with the same rights; the old one is accepted for `overlap` more."""
        time = duration(overlap) if isinstance(overlap, str) else overlap
        return self._store.rotate(id_or_name, overlap=time, by=operator())

    def revoke(self, id_or_name: str) -> ApiKey:
        """End a key."""
        return self._store.revoke(id_or_name, by=operator())


def api_key() -> str:
    """The key that Tandem's own commands send: that of TANDEM_API_KEY, or of this home's file `api_key`.

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=tandem.api_key())
    """
    return settings().sent_key


def ensure_api_key() -> Path | None:
    """Make a key with the role admin for this home's user, unless there is a valid one, and return the file that it is in.

    None where TANDEM_API_KEY is set: its owner knows of a key.
    """
    known = settings()
    if known.api_key is not None:
        return None
    store = KeyStore.open()
    if not store.accepts(known.sent_key):
        new = store.create("quickstart", role=Role.ADMIN, by=operator())
        write_atomic(known.api_key_file, new.secret + "\n", mode=0o600)
    return known.api_key_file


def duration(text: str) -> timedelta:
    """A time such as 90s, 15m, 12h or 30d; ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise ConfigError(f"{text[:40]!r} is no duration. Give a whole number and a unit: 90s, 15m, 12h or 30d.")
    return timedelta(seconds=int(found[1]) * UNITS_S[found[2]])


def operator() -> str:
    """Who runs this process, for the audit log: `user@host`."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
