"""Model resolution of a batch run: the base and adapter of each name, fixed for the whole run.

A name means at the end of a run what it meant at its start, also where the run was killed in between and the name means
another version by now: what each name resolved to is kept with the run (`ModelResolver.resolved`), and so is that nothing was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.config import AUTO_ENGINE, BatchConfig
from tandem.engine.engines import find_engine, select_engine
from tandem.engine.protocol import AdapterRef
from tandem.errors import RegistryError, UnknownModelError
from tandem.ids import folder_digest
from tandem.registry import HubModel, ModelRecord, Registry, find_model
from tandem.registry.source import checked_folder, folder_of


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A model that engines of the run hold."""

    id: str
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Who answers: a base, or one of its adapters."""

    base: BaseModel
    adapter: AdapterRef | None = None

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return self.adapter.id if self.adapter else self.base.id


class ModelResolver:
    """The names that rows may use. `find` looks each one up once."""

    def __init__(self, config: BatchConfig, registry: Registry, known: Mapping[str, str | None]) -> None:
        """`known`: what names meant when the run began; empty for a new one."""
        self._registry = registry
        self._known = known
        self._engine = config.engine
        self._targets: dict[str, ResolvedModel | str] = {}
        self.resolved: dict[str, str | None] = {}
        """Each name that was asked for, and the id of what it means; None: nothing."""
        self.default = self._default(config)
        """Who answers rows that name nobody."""

    def find(self, name: str | None) -> ResolvedModel:
        """Who a row's `model` means. Raises UnknownModelError, and other RegistryErrors, with the reason."""
        if name is None:
            return self.default
        target = self._targets.get(name)
        if target is None:
            try:
                target = self.default if name == self.default.engine_name else self._look_up(name)
            except RegistryError as error:
                target, self.resolved[name] = str(error), None
            self._targets[name] = target
        if isinstance(target, str):
            raise UnknownModelError(target)
        return target

    @property
    def targets(self) -> dict[str, ResolvedModel]:
        """All that rows have named."""
        return {name: each for name, each in self._targets.items() if isinstance(each, ResolvedModel)}

    def adapters_of(self, base: str) -> int:
        """How many adapters of a base the rows ask for, the default among them."""
        asked = {*self.targets.values(), self.default}
        return len({target.adapter.id for target in asked if target.adapter and target.base.id == base})

    def _default(self, config: BatchConfig) -> ResolvedModel:
        if (folder := folder_of(config.model)) is not None:
            checked_folder(folder, "model")
            # It has no version that would tell another one apart from it.
            self.resolved[config.model] = folder_digest(folder)
            return ResolvedModel(BaseModel(id=folder.name, name=folder.name, path=str(folder)))
        try:
            if config.model not in self._known and HubModel.parse(config.model):
                record = find_model(config.model, self._registry)
                assert not isinstance(record, Path)
                self.resolved[config.model] = record.id
                return ResolvedModel(_base(record))
            return self._look_up(config.model)
        except UnknownModelError:
            if config.engine == AUTO_ENGINE or find_engine(config.engine, "engine").needs_files:
                raise
            return ResolvedModel(BaseModel(id=config.model, name=config.model, path=""))

    def _look_up(self, name: str) -> ResolvedModel:
        if name in self._known and self._known[name] is None:
            raise UnknownModelError(f"No model or adapter {name!r} was registered when the run began.")
        record = self._registry.resolve(self._known.get(name) or name)
        self.resolved[name] = record.id
        if record.kind == "model":
            return ResolvedModel(_base(record))
        base = _base(self._registry.resolve(str(record.base)))
        if record.dora and not (engine := select_engine(self._engine, Path(base.path), "engine")).dora:
            raise RegistryError(
                f"{record.id} is a DoRA adapter, which the engine {engine.name} does not serve. Merge it into its base: "
                f"`tandem models merge {record.id} NEW_NAME`."
            )
        return ResolvedModel(base, AdapterRef(id=record.id, path=record.location, digest=record.digest))


def _base(record: ModelRecord) -> BaseModel:
    return BaseModel(id=record.id, name=record.name, path=str(record.path))
