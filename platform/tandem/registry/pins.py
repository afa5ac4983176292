"""Pinned adapters: those that every replica of their base keeps loaded."""

from __future__ import annotations

from sqlalchemy import select

from tandem.db.schema import ModelRow, NameRow, PinRow
from tandem.errors import RegistryError
from tandem.registry import names
from tandem.registry.connection import RegistryConnection
from tandem.registry.records import ModelRecord
from tandem.registry.rows import record_of


class Pins(RegistryConnection):
    """The pins in a registry's database."""

    def pin(self, name_or_id: str) -> ModelRecord:
        """Have each replica of its base keep an adapter loaded: a version, or whichever one a name means."""
        with self._writing() as (session, _):
            row = names.find(session, name_or_id)
            if row.kind != "adapter":
                raise RegistryError(f"{row.id} is a model; adapters are pinned. Its replicas hold it anyway.")
            record = record_of(row)
            if session.get(PinRow, name_or_id) is None:
                session.add(PinRow(target=name_or_id, name=row.name))
            else:
                session.rollback()
            return record

    def unpin(self, name_or_id: str) -> bool:
        """Undo `pin`, of the same name or id; False if it was not pinned."""
        with self._writing() as (session, _):
            row = session.get(PinRow, name_or_id)
            if row is None:
                session.rollback()
                return False
            session.delete(row)
            return True

    def pins(self) -> list[str]:
        """The pinned names and ids, as they were given."""
        with self._reading() as session:
            return list(session.scalars(select(PinRow.target).order_by(PinRow.target)))

    def pinned(self, base: str) -> list[ModelRecord]:
        """The adapters of a base (by its id) that its replicas keep loaded now."""
        with self._reading() as session:
            # Pins are few, and adapters many: from the pins, each by its key.
            targets = session.scalars(select(PinRow.target)).all()
            query = select(NameRow.promoted).where(NameRow.name.in_(targets), NameRow.promoted.is_not(None))
            promoted_ids = session.scalars(query).all()
            rows = session.scalars(
                select(ModelRow).where(ModelRow.id.in_([*targets, *promoted_ids])).order_by(ModelRow.id)
            )
            return [record_of(row) for row in rows if row.base == base]
