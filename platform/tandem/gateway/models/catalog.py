"""Catalog of model names: resolves a client's `model` to a base model and an adapter, anew for every request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tandem.auth.principal import Principal, Role
from tandem.engine.descriptor import EngineDescriptor
from tandem.engine.engines import ENGINES
from tandem.engine.protocol import AdapterRef
from tandem.errors import RegistryUnreachableError, UnknownModelError, UnknownVersionError, did_you_mean
from tandem.gateway.errors import ApiError, no_registry, unknown_model
from tandem.gateway.models.adapter_list import AdapterList
from tandem.gateway.models.registry_reads import RegistryReads
from tandem.ids import split_version
from tandem.registry import ModelRecord, Registry
from tandem.routing.records import ServedModel, prefill_pool

PAGE = 1000
"""Largest number of adapters in one list of models."""
LONGEST_NAME = 256
"""Longest name that is looked up, in characters: a search for names similar to megabytes would block every stream."""
ANSWER_S = 5.0
"""Seconds that the registry has to answer."""
STALE_S = 3600.0
"""Seconds for which a cached name is used while the registry does not answer."""
MAX_CACHED = 10_000
"""Names whose records are cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A client's model name, resolved."""

    base: ServedModel
    adapter: AdapterRef | None = None
    prefill: bool = False
    """Whether the request goes to the prefill replicas."""
    pinned: bool = False
    """Whether the client named a version, or an adapter of one: no other version may answer."""

    @property
    def pool(self) -> str:
        """Id of the replica pool that serves it."""
        return prefill_pool(self.base.id) if self.prefill else self.base.id

    @property
    def engine(self) -> EngineDescriptor:
        """The engine that serves it."""
        return ENGINES[self.base.config.engine]

    @property
    def engine_name(self) -> str:
        """Its `model` in requests to the engine."""
        return self.adapter.id if self.adapter else self.base.id


@dataclass(slots=True)
class CachedRecord:
    """A record that was read from the registry."""

    record: ModelRecord
    revision: int | None
    """The registry's revision before it was read; None: not known."""
    confirmed_at: float
    """Monotonic time at which the name last meant this, by the registry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A model as `/v1/models` lists it."""

    name: str
    id: str
    base: ServedModel
    adapter: bool
    created: int

    def to_json(self) -> dict[str, Any]:
        """OpenAI's model object, with the fields that vLLM adds to it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tandem",
            "root": self.id,
            "parent": self.base.name if self.adapter else None,
            "max_model_len": self.base.max_length,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPage:
    """One page of the list of models."""

    cards: list[ModelCard]
    next: str | None
    """The name after which the next page starts; None: this is the last."""


class Catalog:
    """Served models by all their names, and their adapters in the registry.

    Each request for an adapter reads the registry's revision, so new adapters and promotions apply at once; records are read
    again only when the revision has changed. While the registry does not answer, a name means what it meant when it last did,
    for `STALE_S` at most.
    """

    def __init__(self, models: Iterable[ServedModel], registry: Registry, retry_after_s: int = 5) -> None:
        """`retry_after_s`: Retry-After of errors while the registry does not answer."""
        self.models = tuple(models)
        self._retry_after_s = retry_after_s
        self._served: dict[str, ServedModel] = {}
        for model in self.models:
            self._served[model.id] = self._served[model.name] = model
        self._by_id = {model.id: model for model in self.models}
        self._cached_records: dict[str, CachedRecord] = {}
        self._unregistered_at: dict[str, int | None] = {}
        """Names that were not registered, with the registry's revision then."""
        self._reads = RegistryReads(registry.impatient(), name="registry")
        # Lists take longer than all else, and must not delay it.
        self._list_reads = RegistryReads(registry.impatient(), name="registry-lists")
        bases = [model.id for model in self.models if model.config.max_adapters > 0]
        self._adapters = AdapterList(self._list_reads, bases, self._reads.revision, self._served)
        self._hint_thread = ThreadPoolExecutor(1, thread_name_prefix="similar-names")
        self._reads.on_poll = self._adapters.changed

    def start(self) -> None:
        """Begin to follow the registry in the background."""
        self._reads.start()

    async def stop(self) -> None:
        """Stop, and end the connections to the registry."""
        await self._reads.stop()
        await self._list_reads.stop()
        self._hint_thread.shutdown(wait=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names and ids that the served models answer to."""
        return tuple(self._served)

    def usable(self, principal: Principal) -> list[ServedModel]:
        """The served models that a principal may use."""
        return [
            model for model in self.models if principal.sees(model.tenant) and may_use(principal, model.name, model.id)
        ]

    async def resolve(self, name: str, principal: Principal) -> ResolvedModel:
        """The model of a name or id.

        ApiError 404 with the nearest name, also where `principal` may not use it; 400 for one that cannot be served, 503 where
        the registry does not answer.
        """
        if len(name) > LONGEST_NAME:
            raise ApiError(
                400, f"`model` has {len(name)} characters; names here have {LONGEST_NAME} at most.", param="model"
            )
        if not name.isprintable():
            raise ApiError(400, "`model` has a character that no name has, such as a control character.", param="model")
        served = self._served.get(name)
        if served is not None:
            if not (principal.sees(served.tenant) and may_use(principal, served.name, served.id)):
                raise await self._unknown_model_error(name, principal)
            return ResolvedModel(base=served, pinned=name != served.name)
        try:
            record = await self._record(name)
        except UnknownModelError as error:
            # Only principals that may use a version are told which versions exist.
            if isinstance(error, UnknownVersionError) and await self._may_see_versions(name, principal):
                raise unknown_model(str(error)) from None
            raise await self._unknown_model_error(name, principal) from None
        base = self._by_id.get(record.base or record.id)
        if not (principal.sees(record.tenant) and (base is None or principal.sees(base.tenant))):
            raise await self._unknown_model_error(name, principal)
        alias = [base.name] if base is not None and record.kind == "model" else []
        if not may_use(principal, name, record.id, *alias):
            raise await self._unknown_model_error(name, principal)
        if base is None:
            served_names = ", ".join(model.id for model in self.usable(principal)) or "others"
            reason = (
                f"the adapter {record.id} needs {record.base}"
                if record.kind == "adapter"
                else f"{record.id} is registered"
            )
            raise unknown_model(f"The model {name!r} is not served here: {reason}, and this app serves {served_names}.")
        if record.kind == "model":
            return ResolvedModel(base=base, pinned=True)
        if record.dora and not ENGINES[base.config.engine].dora:
            raise ApiError(
                400,
                f"{record.id} is a DoRA adapter, which vLLM does not serve. Merge it into its base: "
                f"`tandem models merge {record.id} NEW_NAME`, and serve that.",
                param="model",
            )
        config = base.config
        if not config.max_adapters:
            raise ApiError(400, f"{base.name} is served without adapters (max_adapters is 0).", param="model")
        if record.rank is not None and record.rank > config.max_lora_rank:
            raise ApiError(
                400,
                f"The adapter {record.id} has rank {record.rank}; {base.name} is served with max_lora_rank "
                f"{config.max_lora_rank}. Serve it with a larger one.",
                param="model",
            )
        return ResolvedModel(base=base, adapter=AdapterRef.of(record), pinned=True)

    async def page(self, principal: Principal, after: str | None = None, limit: int = PAGE) -> ModelPage:
        """Names that a principal may use: the served models, then at most `limit` adapters by name, after the name `after`.

        For a principal with a list of models: those of the list, by name.
        """
        cards = [
            ModelCard(name=model.name, id=model.id, base=model, adapter=False, created=model.created)
            for model in self.models
            if after is None and principal.sees(model.tenant)
        ]
        if principal.models:
            return await self._named_page(after, limit, principal)
        try:
            adapters, has_more = await self._adapters.page(after, limit, _visible_tenant(principal))
        except RegistryUnreachableError as error:
            raise self._no_registry_error() from error
        cards += [
            ModelCard(
                name=adapter.name, id=adapter.id, base=self._by_id[adapter.base], adapter=True, created=adapter.created
            )
            for adapter in adapters
        ]
        return ModelPage(cards=cards, next=adapters[-1].name if has_more else None)

    async def _named_page(self, after: str | None, limit: int, principal: Principal) -> ModelPage:
        names = [name for name in sorted(set(principal.models)) if after is None or name > after]
        cards = []
        for name in names[:limit]:
            with contextlib.suppress(ApiError):  # not served, or not registered any more
                cards.append(await self.card(name, principal))
        return ModelPage(cards=cards, next=names[limit - 1] if len(names) > limit else None)

    async def card(self, name: str, principal: Principal) -> ModelCard:
        """The model or adapter of one name or id; ApiError 404 if there is none, or none that `principal` may use."""
        target = await self.resolve(name, principal)
        if name in self._served:
            base = target.base
            return ModelCard(name=name, id=base.id, base=base, adapter=False, created=base.created)
        record = await self._record(name)
        created = int(record.created_at.timestamp())
        return ModelCard(name=name, id=record.id, base=target.base, adapter=record.kind == "adapter", created=created)

    async def _record(self, name: str) -> ModelRecord:
        """The record of a name; UnknownModelError if there is none, ApiError 503 if the registry does not answer."""
        revision = await self._reads.revision()
        now = time.monotonic()
        cached = self._cached_records.get(name)
        if cached is not None:
            if revision == cached.revision:
                cached.confirmed_at = now
                return cached.record
            if revision is None and now - cached.confirmed_at < STALE_S:
                return cached.record
        if revision is not None and self._unregistered_at.get(name) == revision:
            raise UnknownModelError(f"{name!r} is not registered.")
        try:
            record = await self._reads.read(lambda registry: registry.resolve(name, suggest=False), ANSWER_S)
        except RegistryUnreachableError as error:
            if cached is not None and now - cached.confirmed_at < STALE_S:
                return cached.record
            raise self._no_registry_error() from error
        except UnknownVersionError:
            self._cached_records.pop(name, None)
            raise
        except UnknownModelError:
            self._cached_records.pop(name, None)
            if len(self._unregistered_at) >= MAX_CACHED:
                self._unregistered_at.clear()
            self._unregistered_at[name] = revision
            raise
        if len(self._cached_records) >= MAX_CACHED:
            self._cached_records.clear()
        self._cached_records[name] = CachedRecord(record, revision, now)
        return record

    async def _may_see_versions(self, name: str, principal: Principal) -> bool:
        """Whether a principal may learn which versions the name of an unknown version has."""
        unversioned_name = split_version(name)[0]
        try:
            return may_use(principal, name) and principal.sees((await self._record(unversioned_name)).tenant)
        except UnknownModelError:  # none of its versions is promoted
            return principal.role is Role.ADMIN or not principal.tenant

    async def _unknown_model_error(self, name: str, principal: Principal) -> ApiError:
        if principal.models:
            similar_names, alternatives = [*principal.models], f"This key may use {', '.join(principal.models[:10])}."
        else:
            similar_names = [card.name for card in (await self.page(principal, limit=10)).cards]
            alternatives = f"Served here: {', '.join(similar_names[:10])}."
            similar_names += self._adapters.near(name, _visible_tenant(principal))
        # Comparing long names takes longer than the streams may be kept waiting.
        hint = await asyncio.get_running_loop().run_in_executor(self._hint_thread, did_you_mean, name, similar_names)
        return unknown_model(f"The model {name!r} does not exist.{hint} {alternatives}")

    def _no_registry_error(self) -> ApiError:
        # The registry's address and error are not for clients.
        reason = "The registry of adapters does not answer; models that are served here answer to their own names"
        return no_registry(reason, self._retry_after_s)


def _visible_tenant(principal: Principal) -> str | None:
    """The tenant whose names, beside shared ones, are all that exist for a principal; None: all do."""
    return None if principal.sees_all else principal.tenant


def may_use(principal: Principal, *names: str) -> bool:
    """Whether a principal may use a model or adapter, given by all its names: an alias, a registered name, the id of a version.

    A list with a name covers all its versions, a list with an id that version alone, however a request names it.
    """
    return principal.may_use(*names, *(split_version(name)[0] for name in names))
