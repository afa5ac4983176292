"""Callers and loads for requests of batches: the principal of a key by its id, and the load of the replicas behind a name."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from tandem.auth.key_table import KeyTable
from tandem.auth.keys import KEY_ID
from tandem.auth.principal import ANONYMOUS, Limits, Principal, Role
from tandem.auth.tenants import DEFAULT_TENANT
from tandem.gateway.admission.control import Admission
from tandem.gateway.errors import ApiError
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.work.batch_capacity import ModelLoad, PoolLoad
from tandem.routing.records import ServedModel

ANYBODY = Principal(key_id="", tenant="", role=Role.ADMIN)
"""Sees the names of all tenants."""

UNKNOWN_S = 30.0
"""Seconds until a name that no model has is looked up again."""


class Callers:
    """The principals of keys."""

    def __init__(self, keys: KeyTable) -> None:
        self._keys = keys

    def __call__(self, key_id: str, tenant: str, models: tuple[str, ...] = ()) -> Principal | None:
        """The principal of the key that a batch was made with, as it is now; None: the key has ended.

        `models`: that the key or token allowed when the batch was made; empty: all. Of a token nothing else is known later.
        The key's limits by the minute and of requests at once do not hold for batches, which have no pace of their own; those of
        its tenant do.
        """
        if not key_id:
            return ANONYMOUS if tenant == DEFAULT_TENANT else replace(ANONYMOUS, tenant=tenant)
        if not KEY_ID.fullmatch(key_id):  # of a token of an OIDC provider
            return Principal(key_id=key_id, tenant=tenant, role=Role.USER, models=models)
        principal = self._keys.principal_of(key_id)
        if principal is None:
            return None
        return replace(principal, limits=Limits(tokens_per_day=principal.limits.tokens_per_day))


class PoolLoads:
    """The loads of replicas by the names that batches give."""

    def __init__(self, catalog: Catalog, admission: Admission) -> None:
        self._catalog = catalog
        self._admission = admission
        self._bases: dict[str, ServedModel] = {}
        self._unknown_until: dict[str, float] = {}
        """Names that no model has, with the monotonic time of their next look-up: each costs a search for similar names."""

    async def learn(self, names: Iterable[str]) -> None:
        """Look up names; those that mean no model any more are forgotten."""
        bases, unknown_until, now = {}, {}, time.monotonic()
        for name in names:
            if (until := self._unknown_until.get(name, now)) > now:
                unknown_until[name] = until
                continue
            try:
                bases[name] = (await self._catalog.resolve(name, ANYBODY)).base
            except ApiError as error:
                if error.status < 500:
                    unknown_until[name] = now + UNKNOWN_S
                elif name in self._bases:
                    bases[name] = self._bases[name]
        self._bases, self._unknown_until = bases, unknown_until

    def __call__(self, name: str) -> PoolLoad | None:
        """The load for a name; None: no such model is served here."""
        model = self._bases.get(name)
        if model is None:
            return None
        queue = self._admission.queue(model)
        return PoolLoad(base=model.id, load=ModelLoad(limit=queue.limit, running=queue.running, waiting=len(queue)))
