"""Catalog of model names: resolves a client's `model` to a base model and an adapter, anew for every request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tandem.auth.principal import Principal
from tandem.engine.descriptor import EngineDescriptor
from tandem.engine.engines import ENGINES
from tandem.engine.protocol import AdapterRef
from tandem.errors import RegistryUnreachableError, UnknownModelError, UnknownVersionError, did_you_mean
from tandem.gateway.errors import ApiError, no_registry, unknown_model
from tandem.ids import split_version
from tandem.registry import ModelRecord, Registry
from tandem.routing.records import ServedModel, prefill_pool

PAGE = 1000
"""Largest number of adapters in one list of models."""
LONGEST_NAME = 256
"""Longest name that is looked up, in characters: a search for names similar to megabytes would block every stream."""
ANSWER_S = 5.0
"""Seconds that the registry has to answer."""
REMEMBERED = 10_000
"""Names whose records are cached between changes of the registry."""


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
    again only when the revision has changed. Registry access runs in a thread of its own.
    """

    def __init__(self, models: Iterable[ServedModel], registry: Registry, retry_after_s: int = 5) -> None:
        """`retry_after_s`: Retry-After of errors while the registry does not answer."""
        self.models = tuple(models)
        self._retry_after_s = retry_after_s
        self._served: dict[str, ServedModel] = {}
        for model in self.models:
            self._served[model.id] = self._served[model.name] = model
        self._by_id = {model.id: model for model in self.models}
        self._registry = registry
        self._revision: int | None = None
        self._found: dict[str, ModelRecord] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")

    @property
    def names(self) -> tuple[str, ...]:
        """Names and ids that the served models answer to."""
        return tuple(self._served)

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
            if not may_use(principal, served.name, served.id):
                raise await self._unknown(name, principal)
            return ResolvedModel(base=served, pinned=name != served.name)
        try:
            record = await self._ask(self._find, name)
        except UnknownModelError as error:
            # Which versions there are is for those who may use one.
            if isinstance(error, UnknownVersionError) and may_use(principal, name):
                raise unknown_model(str(error)) from None
            raise await self._unknown(name, principal) from None
        base = self._by_id.get(record.base or record.id)
        alias = [base.name] if base is not None and record.kind == "model" else []
        if not may_use(principal, name, record.id, *alias):
            raise await self._unknown(name, principal)
        if base is None:
            here = ", ".join(m.id for m in self.models if may_use(principal, m.name, m.id)) or "others"
            what = (
                f"the adapter {record.id} needs {record.base}"
                if record.kind == "adapter"
                else f"{record.id} is registered"
            )
            raise unknown_model(f"The model {name!r} is not served here: {what}, and this app serves {here}.")
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
            ModelCard(name=m.name, id=m.id, base=m, adapter=False, created=m.created)
            for m in self.models
            if after is None
        ]
        if principal.models:
            return await self._named_page(after, limit, principal)
        # One more than `limit` shows whether there is a next page.
        records = await self._ask(self._adapters, after, limit + 1)
        shown = records[:limit]
        cards += [self._card(r) for r in shown if self._is_served(r)]
        return ModelPage(cards=cards, next=shown[-1].name if len(records) > limit else None)

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
        record: ModelRecord = await self._ask(self._find, name)
        created = int(record.created_at.timestamp())
        return ModelCard(name=name, id=record.id, base=target.base, adapter=record.kind == "adapter", created=created)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _find(self, name: str) -> ModelRecord:
        revision = self._registry.revision()
        if revision != self._revision:
            self._found.clear()
            self._revision = revision
        record = self._found.get(name)
        if record is None:
            record = self._registry.resolve(name)
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            self._found[name] = record
        return record

    def _adapters(self, after: str | None, limit: int) -> list[ModelRecord]:
        pages = [self._registry.list("adapter", base=m.id, after=after, limit=limit) for m in self.models]
        return sorted((record for page in pages for record in page), key=lambda record: record.name)[:limit]

    def _is_served(self, record: ModelRecord) -> bool:
        base = self._by_id[record.base or ""]
        return base.config.max_adapters > 0 and not record.dora and record.name not in self._served

    def _card(self, record: ModelRecord) -> ModelCard:
        created = int(record.created_at.timestamp())
        return ModelCard(
            name=record.name, id=record.id, base=self._by_id[record.base or ""], adapter=True, created=created
        )

    async def _unknown(self, name: str, principal: Principal) -> ApiError:
        if principal.models:
            known, here = [*principal.models], f"This key may use {', '.join(principal.models[:10])}."
        else:
            known = [card.name for card in (await self.page(principal, limit=10)).cards]
            here = f"Served here: {', '.join(known[:10])}."
            known += await self._ask(self._registry.near, name)
        return unknown_model(f"The model {name!r} does not exist.{did_you_mean(name, known)} {here}")

    async def _ask(self, work: Callable[..., Any], *args: Any) -> Any:
        # SQLite answers in 0.1 ms, but a disk or a network may not, and must not stop the streams.
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except (TimeoutError, RegistryUnreachableError) as error:
            # The registry's address and error are not for clients.
            reason = "The registry of adapters does not answer; models that are served here answer to their own names"
            raise no_registry(reason, self._retry_after_s) from error


def may_use(principal: Principal, *names: str) -> bool:
    """Whether a principal may use a model or adapter, given by all its names: an alias, a registered name, the id of a version.

    A list with a name covers all its versions, a list with an id that version alone, however a request names it.
    """
    return principal.may_use(*names, *(split_version(name)[0] for name in names))
