"""Registry store: registration, lookup, promotion and deletion of models and adapters. Safe for concurrent processes.

Made for a hundred thousand adapters: what is asked for each request (`resolve`, `revision`) reads a row or two by key, and lists
come in pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select, tuple_

from tandem.db.audit import Change, record_change
from tandem.db.schema import ModelRow, NameRow, PinRow
from tandem.errors import RegistryError
from tandem.ids import canonical_json, check_name, folder_digest, is_hub_name, split_version, versioned
from tandem.registry import conditions, names
from tandem.registry.adapter_cache import AdapterCache
from tandem.registry.adapter_files import adapter_digest, check_adapter
from tandem.registry.conditions import ALWAYS, Condition
from tandem.registry.folders import model_max_length
from tandem.registry.pins import Pins
from tandem.registry.records import AdapterSummary, Kind, ModelRecord, Promotion
from tandem.registry.rows import can_be_had, is_there, record_of, with_article
from tandem.storage import Location, is_remote, local_path

# Inside the class, `list` is a method.
Records = list[ModelRecord]
Promotions = list[Promotion]
Names = list[str]
Summaries = list[AdapterSummary]


class Registry(Pins):
    """Models and adapters by name. Versions count from 1; a version never changes, and its id is never reused."""

    def register_model(
        self,
        name: str,
        path: str | Path,
        *,
        lineage: Mapping[str, Any] | None = None,
        promote: bool = True,
        tenant: str | None = None,
    ) -> ModelRecord:
        """Register a folder with config.json and safetensors.

        The same content as the name's newest version gives that version's record; other content the next version. `tenant`: whom
        a new name belongs to; None: it is shared. RegistryError where the name belongs to another one.
        """
        folder = local_path(path)
        check_name(name, "model name")
        max_length = model_max_length(folder)
        # Reading the files takes long for a large model, so it comes before the transaction.
        content = folder_digest(folder)
        return self._register(
            name,
            "model",
            str(folder),
            content,
            lineage or {},
            max_length=max_length,
            promoting=promote,
            tenant=tenant,
        )

    def register_hub_model(
        self, repo: str, folder: Path, content: str, *, lineage: Mapping[str, Any], promote: bool | None
    ) -> ModelRecord:
        """Register a model of the Hugging Face hub under its name there, `org/name`.

        `content`: its `folder_digest`. The same content as any of the name's versions gives that version's record: a commit that
        changes nothing but a README makes no new version. `promote` None: only if the name means no version.
        """
        if not is_hub_name(repo):
            raise RegistryError(f"{repo!r} is no name of the Hugging Face hub; one has the form org/name.")
        with self._reading() as session:
            name_row = session.get(NameRow, repo)
            promoting = promote if promote is not None else name_row is None or name_row.promoted is None
            query = select(ModelRow).where(ModelRow.name == repo, ModelRow.digest == content)
            rows = session.scalars(query.order_by(ModelRow.version.desc())).all()
            same_record = next((record_of(row) for row in rows if can_be_had(row.path)), None)
            is_current = name_row is not None and name_row.promoted == (same_record.id if same_record else None)
        if same_record is not None:
            return self.promote(same_record.id) if promoting and not is_current else same_record
        max_length = model_max_length(folder)
        return self._register(repo, "model", str(folder), content, lineage, max_length=max_length, promoting=promoting)

    def register_adapter(
        self,
        name: str,
        source: Location,
        *,
        base: str,
        lineage: Mapping[str, Any] | None = None,
        promote: bool = True,
        tenant: str | None = None,
    ) -> ModelRecord:
        """Register a LoRA adapter in peft's format, from a folder or a URI, for `base` (a name or an id of a model).

        The name then means this version; without `promote` it is a candidate, called by its id only. The same content and base
        as the name's newest version gives that version's record. `tenant`: whom a new name belongs to; None: the base's tenant.
        Raises AdapterError, a RegistryError, with the reason if the files cannot be served on that base, and RegistryError where
        the name belongs to another tenant.
        """
        check_name(name, "adapter name")
        base_record = self.resolve(base)
        if base_record.kind != "model":
            raise RegistryError(
                f"{base_record.id} is an adapter of {base_record.base}; an adapter needs a model as its base."
            )
        if is_remote(source):
            location = str(source).rstrip("/")
            folder, content = AdapterCache.open().fetch(location)
            files = check_adapter(folder, base_record.path)
        else:
            folder = local_path(source)
            location = str(folder)
            files = check_adapter(folder, base_record.path)
            content = adapter_digest(folder)
        return self._register(
            name,
            "adapter",
            location,
            content,
            dict(lineage or {}) | ({"dora": True} if files.dora else {}),
            base=base_record.id,
            rank=files.rank,
            promoting=promote,
            tenant=tenant or base_record.tenant,
        )

    def resolve(self, name_or_id: str, *, suggest: bool = True) -> ModelRecord:
        """The record of `name@version`, or of the version that a name means: the one promoted last.

        Raises UnknownModelError with the nearest name; without `suggest` that search, which takes longest, is left out.
        """
        with self._reading() as session:
            return record_of(names.find(session, name_or_id, suggest=suggest))

    def versions(self, name_or_id: str) -> Records:
        """One version (by id), or all of a name, oldest first. Raises UnknownModelError with the nearest name."""
        with self._reading() as session:
            return [record_of(row) for row in names.find_versions(session, name_or_id)]

    def promote(self, version_id: str, condition: Condition = ALWAYS) -> ModelRecord:
        """Make `name@version` what its name means, from the next request on.

        ChangedMeanwhileError, and nothing changes, if the name does not mean what the condition expects.
        """
        name, version = split_version(version_id)
        if version is None:
            raise RegistryError(f"Say which version of {name} to promote, such as {versioned(name, 1)}.")
        with self._writing() as (session, _):
            if earlier := conditions.result_of_earlier(session, condition):
                return record_of(names.find(session, earlier))
            row = names.find(session, version_id)
            conditions.check(session, condition, name)
            record = record_of(row)
            conditions.remember(session, condition, record.id)
            if not names.promote(session, row) and condition.once is None:
                session.rollback()
            return record

    def roll_back(self, name: str, condition: Condition = ALWAYS) -> ModelRecord:
        """Make a name mean the version that was promoted before; called again, the one before that.

        Conditions as in `promote`.
        """
        if split_version(name)[1] is not None:
            raise RegistryError(f"A name is rolled back, not a version: `{split_version(name)[0]}`, or promote {name}.")
        with self._writing() as (session, _):
            if earlier := conditions.result_of_earlier(session, condition):
                return record_of(names.find(session, earlier))
            conditions.check(session, condition, name)
            record = record_of(names.roll_back(session, name))
            conditions.remember(session, condition, record.id)
            return record

    def promoted(self, records: Iterable[ModelRecord]) -> set[str]:
        """The ids of those records that are promoted now."""
        query = select(NameRow.promoted).where(NameRow.name.in_({record.name for record in records}))
        with self._reading() as session:
            return {version_id for version_id in session.scalars(query) if version_id is not None}

    def promotions(self, name: str) -> Promotions:
        """The promotions of a name, newest first, with those that were rolled back."""
        with self._reading() as session:
            rows = names.history(session, name)
            return [Promotion(name=row.name, version=row.version, at=row.at, taken_back=row.taken_back) for row in rows]

    def assign(self, name: str, tenant: str | None, *, by: str) -> None:
        """Let a name, with all its versions, belong to a tenant, or (None) to all; `by` says who did, for the audit log.

        UnknownModelError with the nearest name. Apps that serve a model itself follow at their next deployment, all others at
        the next request.
        """
        with self._writing() as (session, _):
            names.find_versions(session, name)
            name_row = session.get_one(NameRow, split_version(name)[0])
            old_tenant, name_row.tenant = name_row.tenant, tenant
            change = Change(
                by=by, action="models.assign", target=name, before={"tenant": old_tenant}, after={"tenant": tenant}
            )
            record_change(session, change)

    def list(
        self,
        kind: Kind | None = None,
        all_versions: bool = False,
        *,
        base: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Records:
        """Records by name and version: the promoted version of each name, or all versions.

        `base`: adapters of that model (by its id) only. A page has at most `limit` records and starts after the name (with
        `all_versions`: the id) `after`.
        """
        query = select(ModelRow)
        # Each case reads along one index, in the order of the page.
        table: type[NameRow | ModelRow] = ModelRow
        if not all_versions:
            query = query.join(NameRow, (NameRow.name == ModelRow.name) & (NameRow.promoted == ModelRow.id))
            table = NameRow if base is None else ModelRow
        query = query.order_by(table.name, *([ModelRow.version] if all_versions else [])).limit(limit)
        if kind is not None:
            query = query.where(table.kind == kind)
        if base is not None:
            query = query.where(ModelRow.base == base)
        if after is not None:
            name, version = split_version(after)
            if all_versions and version is not None:
                query = query.where(tuple_(ModelRow.name, ModelRow.version) > (name, version))
            else:
                query = query.where(table.name > name)
        with self._reading() as session:
            return [record_of(row) for row in session.scalars(query)]

    def summaries(self, base: str, *, after: str, limit: int) -> Summaries:
        """The promoted adapters of a base by name, `limit` of them after the name `after`: what lists show, and no more."""
        query = (
            select(
                ModelRow.name,
                ModelRow.id,
                ModelRow.created_at,
                ModelRow.lineage["dora"].as_boolean(),
                NameRow.tenant,
            )
            .join(NameRow, (NameRow.name == ModelRow.name) & (NameRow.promoted == ModelRow.id))
            .where(ModelRow.base == base, ModelRow.name > after)
            .order_by(ModelRow.name)
            .limit(limit)
        )
        with self._reading() as session:
            return [
                AdapterSummary(name, id_, base, int(created.timestamp()), bool(dora), tenant)
                for name, id_, created, dora, tenant in session.execute(query)
            ]

    def near(self, name: str) -> Names:
        """Registered names around where `name` would stand in the alphabet; at most 200."""
        with self._reading() as session:
            return names.near(session, name)

    def summary(self, name: str) -> dict[str, Any]:
        """State of a name, for the audit log: the number of its versions, the promoted one, and its pins."""
        with self._reading() as session:
            name_row = session.get(NameRow, name)
            count = session.scalar(select(func.count()).select_from(ModelRow).where(ModelRow.name == name))
            pins = session.scalars(select(PinRow.target).where(PinRow.name == name).order_by(PinRow.target))
            return {"versions": count, "promoted": name_row.promoted if name_row else None, "pinned": list(pins)}

    def newest_model(self) -> ModelRecord | None:
        """The model (not adapter) that was registered last."""
        query = select(ModelRow).where(ModelRow.kind == "model").order_by(ModelRow.revision.desc()).limit(1)
        with self._reading() as session:
            row = session.scalar(query)
            return None if row is None else record_of(row)

    def remove(self, name_or_id: str, *, kind: Kind | None = None) -> Records:
        """Remove the records of one version (by id) or of all of a name; the files stay. Returns the records, oldest first.

        A name whose promoted version goes means the one promoted before. RegistryError, and nothing changes, if an adapter still
        needs one of them, or if they are not of the `kind` given.
        """
        name = split_version(name_or_id)[0]
        with self._writing() as (session, _):
            rows = names.find_versions(session, name_or_id)
            ids = [row.id for row in rows]
            if kind is not None and rows[0].kind != kind:
                raise RegistryError(
                    f"{rows[0].id} is {with_article(rows[0].kind)}, not {with_article(kind)}, so it stays."
                )
            dependents = select(ModelRow.id).where(ModelRow.base.in_(ids))
            dependent_ids = session.scalars(
                dependents.order_by(ModelRow.base, ModelRow.name).limit(names.MAX_SHOWN + 1)
            ).all()
            if dependent_ids:
                count = session.scalar(select(func.count()).select_from(dependents.subquery()))
                raise RegistryError(
                    f"{name_or_id} is the base of {names.listed(dependent_ids)}, {count} in all. Remove those first."
                )
            removed = [record_of(row) for row in rows]
            names.forget(session, name, [row.version for row in rows])
            pin_targets = [*ids, *([name] if len(ids) == len(names.versions_of(session, name)) else [])]
            session.execute(delete(PinRow).where(PinRow.target.in_(pin_targets)))
            for row in rows:
                session.delete(row)
            return removed

    def check_owner(self, name: str, tenant: str | None) -> None:
        """RegistryError where a name that is in use does not belong to `tenant`; None: any owner is accepted."""
        with self._reading() as session:
            names.check_owner(session, name, tenant)

    def _register(
        self,
        name: str,
        kind: Kind,
        location: str,
        content: str,
        lineage: Mapping[str, Any],
        *,
        base: str | None = None,
        rank: int | None = None,
        max_length: int | None = None,
        promoting: bool,
        tenant: str | None = None,
    ) -> ModelRecord:
        try:
            canonical_json(lineage)
        except (TypeError, ValueError) as error:
            raise RegistryError(f"The lineage of {name} cannot be kept as JSON: {error}.") from error
        with self._writing() as (session, revision):
            newest = session.scalar(
                select(ModelRow).where(ModelRow.name == name).order_by(ModelRow.version.desc()).limit(1)
            )
            if newest is not None and newest.kind != kind:
                raise RegistryError(
                    f"{name} is registered as {with_article(newest.kind)}, so it cannot be {with_article(kind)} too."
                )
            names.check_owner(session, name, tenant)
            # A version whose folder is gone is no version to hand out again.
            if newest is not None and (newest.digest, newest.base) == (content, base) and is_there(newest.path):
                same_record = record_of(newest)
                if not (promoting and names.promote(session, newest)):
                    session.rollback()
                return same_record
            if base is not None and session.get(ModelRow, base) is None:
                raise RegistryError(f"{base} was removed while {name} was being registered.")
            version = names.next_version(session, name, kind, tenant)
            row = ModelRow(
                id=versioned(name, version),
                name=name,
                version=version,
                kind=kind,
                path=location,
                digest=content,
                base=base,
                rank=rank,
                max_length=max_length,
                lineage=dict(lineage),
                created_at=datetime.now(UTC),
                revision=revision,
            )
            session.add(row)
            session.flush()
            if promoting:
                names.promote(session, row)
            return record_of(row)
