"""Adapter management of commands and programs: `jobs.adapters`, with an entry in the audit log for each change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from tandem.auth.audit_log import AuditLog, audited
from tandem.ids import split_version
from tandem.jobs.adapter_entries import deletion_fields, registration_fields
from tandem.jobs.adapters import Adapters
from tandem.registry import ModelRecord, Registry
from tandem.registry.conditions import ALWAYS, Condition
from tandem.sdk.address import find_api_url
from tandem.sdk.keys import operator

T = TypeVar("T")


class AuditedAdapters(Adapters):
    """Operations on adapters by whoever runs this process."""

    @classmethod
    def open(cls) -> AuditedAdapters:
        """Those of TANDEM_HOME's registry."""
        return cls(Registry.open(), find_api_url)

    def register(
        self,
        name: str,
        source: str | Path,
        *,
        base: str | None = None,
        promote: bool = True,
        tenant: str | None = None,
    ) -> ModelRecord:
        """See Adapters.register."""
        work = partial(super().register, name, source, base=base, promote=promote, tenant=tenant)
        return self._change("register", name, work, registration_fields)

    def promote(self, version_id: str, condition: Condition = ALWAYS) -> ModelRecord:
        """See Adapters.promote."""
        return self._change("promote", version_id, partial(super().promote, version_id, condition))

    def roll_back(self, name: str, condition: Condition = ALWAYS) -> ModelRecord:
        """See Adapters.roll_back."""
        return self._change("roll_back", name, partial(super().roll_back, name, condition))

    def pin(self, name_or_id: str) -> ModelRecord:
        """See Adapters.pin."""
        return self._change("pin", name_or_id, partial(super().pin, name_or_id))

    def unpin(self, name_or_id: str) -> bool:
        """See Adapters.unpin."""
        return self._change("unpin", name_or_id, partial(super().unpin, name_or_id))

    def delete(self, name_or_id: str) -> list[ModelRecord]:
        """See Adapters.delete."""
        return self._change("delete", name_or_id, partial(super().delete, name_or_id), deletion_fields)

    @cached_property
    def _audit(self) -> AuditLog:
        return AuditLog.at(self.registry.address)

    def _change(
        self,
        verb: str,
        name: str,
        work: Callable[[], T],
        entry_fields: Callable[[T], dict[str, Any]] = lambda result: {},
    ) -> T:
        return audited(
            work,
            state=partial(self.registry.summary, split_version(name)[0]),
            record=lambda change: self._audit.append([change]),
            action=f"adapters.{verb}",
            target=name,
            entry_fields=entry_fields,
            by=operator(),
        )
