"""Adapter management of commands and programs: `jobs.adapters`, with an entry in the audit log for each change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tandem.auth.audit_log import AuditLog
from tandem.db.audit import Change
from tandem.ids import split_version
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
        register = super().register
        return self._change("register", name, lambda: register(name, source, base=base, promote=promote, tenant=tenant))

    def promote(self, version_id: str, condition: Condition = ALWAYS) -> ModelRecord:
        """See Adapters.promote."""
        promote = super().promote
        return self._change("promote", version_id, lambda: promote(version_id, condition))

    def roll_back(self, name: str, condition: Condition = ALWAYS) -> ModelRecord:
        """See Adapters.roll_back."""
        roll_back = super().roll_back
        return self._change("roll_back", name, lambda: roll_back(name, condition))

    def pin(self, name_or_id: str) -> ModelRecord:
        """See Adapters.pin."""
        pin = super().pin
        return self._change("pin", name_or_id, lambda: pin(name_or_id))

    def unpin(self, name_or_id: str) -> bool:
        """See Adapters.unpin."""
        unpin = super().unpin
        return self._change("unpin", name_or_id, lambda: unpin(name_or_id))

    def delete(self, name_or_id: str) -> list[ModelRecord]:
        """See Adapters.delete."""
        delete = super().delete
        return self._change("delete", name_or_id, lambda: delete(name_or_id))

    def _change(self, verb: str, name: str, work: Callable[[], T]) -> T:
        before = self._state(name)
        result = work()
        change = Change(by=operator(), action=f"adapters.{verb}", target=name, before=before, after=self._state(name))
        AuditLog.at(self.registry.address).append([change])
        return result

    def _state(self, name: str) -> dict[str, Any]:
        return self.registry.summary(split_version(name)[0])
