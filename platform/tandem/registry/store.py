"""The registry: what exists, where its files are, and what it was made from. Safe from several processes at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from tandem.errors import RegistryError, UnknownModelError, did_you_mean
from tandem.ids import canonical_json, check_name, folder_digest, split_version, versioned
from tandem.registry.database import database_errors, open_database
from tandem.registry.folders import adapter_rank, is_dora, model_max_length
from tandem.registry.records import Kind, ModelRecord
from tandem.registry.schema import ClockRow, ModelRow, NameRow
from tandem.settings import settings
from tandem.storage import local_path

# Inside the class, `list` is a method.
Records = list[ModelRecord]


class Registry:
    """Models and adapters by name. Versions count from 1; a version never changes, and its id is never reused."""

    def __init__(self, url: str) -> None:
        """Open the database at an SQLAlchemy URL, created or migrated if need be; RegistryError if that fails."""
        self.url = url
        self._engine = open_database(url)

    @classmethod
    def open(cls) -> Registry:
        """The registry that the settings name."""
        return cls(settings().registry_url)

    def __reduce__(self) -> tuple[type[Registry], tuple[str]]:
        """Pickles as its URL, so that it can be handed to a Ray actor."""
        return Registry, (self.url,)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._engine.dispose()

    def register_model(self, name: str, path: str | Path, *, lineage: Mapping[str, Any] | None = None) -> ModelRecord:
        """Register a folder with config.json and safetensors.

        The same content as the name's newest version gives that version's record; other content the next version.
        """
        folder = local_path(path)
        check_name(name, "model name")
        max_length = model_max_length(folder)
        return self._register(name, "model", folder, lineage or {}, max_length=max_length)

    def register_adapter(
        self, name: str, path: str | Path, *, base: str, lineage: Mapping[str, Any] | None = None
    ) -> ModelRecord:
        """Register a LoRA adapter in peft's format for `base` (a name, meaning its newest version, or an id).

        The same content and base as the name's newest version gives that version's record.
        """
        folder = local_path(path)
        check_name(name, "adapter name")
        rank = adapter_rank(folder)
        lineage = dict(lineage or {}) | ({"dora": True} if is_dora(folder) else {})
        adapted = self.resolve(base)
        if adapted.kind != "model":
            raise RegistryError(f"{adapted.id} is an adapter of {adapted.base}; an adapter needs a model as its base.")
        return self._register(name, "adapter", folder, lineage, base=adapted.id, rank=rank)

    def resolve(self, name_or_id: str) -> ModelRecord:
        """The record of `name@version`, or of a name's newest version; UnknownModelError with the nearest name."""
        with self._reading() as session:
            return _record(_find(session, name_or_id)[0])

    def list(self, kind: Kind | None = None, all_versions: bool = False) -> Records:
        """What is registered, by name and version: the newest version of each name, or all of them."""
        query = select(ModelRow).order_by(ModelRow.name, ModelRow.version)
        if kind is not None:
            query = query.where(ModelRow.kind == kind)
        if not all_versions:
            newest = select(ModelRow.name, func.max(ModelRow.version)).group_by(ModelRow.name)
            query = query.where(tuple_(ModelRow.name, ModelRow.version).in_(newest))
        with self._reading() as session:
            return [_record(row) for row in session.scalars(query)]

    def newest_model(self) -> ModelRecord | None:
        """The model (not adapter) that was registered last."""
        query = select(ModelRow).where(ModelRow.kind == "model").order_by(ModelRow.revision.desc()).limit(1)
        with self._reading() as session:
            row = session.scalar(query)
            return None if row is None else _record(row)

    def remove(self, name_or_id: str) -> Records:
        """Forget one version (by id) or all of a name; the files stay. Returns what was forgotten, oldest first.

        RegistryError, and nothing changes, if an adapter still needs one of them.
        """
        with self._writing() as (session, _):
            rows = _find(session, name_or_id)
            needed_by = session.scalars(select(ModelRow.id).where(ModelRow.base.in_([row.id for row in rows]))).all()
            if needed_by:
                raise RegistryError(
                    f"{name_or_id} is the base of {_some(needed_by)}, {len(needed_by)} in all. Remove those first."
                )
            removed = [_record(row) for row in reversed(rows)]
            for row in rows:
                session.delete(row)
            return removed

    def revision(self) -> int:
        """A number that grows with each change: poll it to know when a copy is stale. One small query."""
        with database_errors(self._engine.url), self._engine.connect() as connection:
            return connection.execute(select(ClockRow.revision)).scalar_one()

    def _register(
        self,
        name: str,
        kind: Kind,
        folder: Path,
        lineage: Mapping[str, Any],
        *,
        base: str | None = None,
        rank: int | None = None,
        max_length: int | None = None,
    ) -> ModelRecord:
        try:
            canonical_json(lineage)
        except (TypeError, ValueError) as error:
            raise RegistryError(f"The lineage of {name} cannot be kept as JSON: {error}.") from error
        # Reading the files takes long for a large model, so it comes before the transaction.
        content = folder_digest(folder)
        with self._writing() as (session, revision):
            newest = session.scalar(
                select(ModelRow).where(ModelRow.name == name).order_by(ModelRow.version.desc()).limit(1)
            )
            if newest is not None and newest.kind != kind:
                raise RegistryError(f"{name} is registered as {_a(newest.kind)}, so it cannot be {_a(kind)} too.")
            # A version whose folder is gone is no version to hand out again.
            if newest is not None and (newest.digest, newest.base) == (content, base) and Path(newest.path).is_dir():
                known = _record(newest)
                session.rollback()
                return known
            if base is not None and session.get(ModelRow, base) is None:
                raise RegistryError(f"{base} was removed while {name} was being registered.")
            names = session.get(NameRow, name)
            if names is None:
                names = NameRow(name=name, kind=kind, last_version=0)
                session.add(names)
            names.kind = kind
            names.last_version += 1
            session.flush()
            row = ModelRow(
                id=versioned(name, names.last_version),
                name=name,
                version=names.last_version,
                kind=kind,
                path=str(folder),
                digest=content,
                base=base,
                rank=rank,
                max_length=max_length,
                lineage=dict(lineage),
                created_at=datetime.now(UTC),
                revision=revision,
            )
            session.add(row)
            return _record(row)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Session]:
        with database_errors(self._engine.url), Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Session, int]]:
        """A transaction that starts by bumping the clock.

        It then holds the write lock on SQLite and the row's lock elsewhere, so what it reads next is the latest, and
        stays so until it commits.
        """
        with database_errors(self._engine.url), Session(self._engine, expire_on_commit=False) as session:
            with session.begin():
                session.execute(update(ClockRow).values(revision=ClockRow.revision + 1))
                yield session, session.execute(select(ClockRow.revision)).scalar_one()


def _find(session: Session, name_or_id: str) -> list[ModelRow]:
    """The rows that `name@version` or a bare name means, newest first; UnknownModelError if there is none."""
    name, version = split_version(name_or_id)
    rows = list(session.scalars(select(ModelRow).where(ModelRow.name == name).order_by(ModelRow.version.desc())))
    found = rows if version is None else [row for row in rows if row.version == version]
    if found:
        return found
    if rows:
        raise UnknownModelError(f"{name} has no version {version}; it has {_some(str(r.version) for r in rows)}.")
    names = session.scalars(select(ModelRow.name).distinct().order_by(ModelRow.name)).all()
    known = f" Registered: {_some(names)}." if names else " Nothing is registered yet; train a model first."
    raise UnknownModelError(f"No model or adapter {name_or_id!r} is registered.{did_you_mean(name, names)}{known}")


def _record(row: ModelRow) -> ModelRecord:
    return ModelRecord(
        name=row.name,
        version=row.version,
        kind=cast(Kind, row.kind),
        path=Path(row.path),
        digest=row.digest,
        base=row.base,
        rank=row.rank,
        max_length=row.max_length,
        lineage=row.lineage,
        created_at=row.created_at,
    )


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _some(words: Iterable[str], limit: int = 10) -> str:
    """The first words, and how many more there are."""
    words = [*words]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
