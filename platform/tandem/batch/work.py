"""Settings that readers and workers of one base share, and the request of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.batch.input.rows import BadRowError, RowRequest, parse, read_row
from tandem.batch.input.sources import Row
from tandem.batch.models import ResolvedModel
from tandem.batch.output.write import Output
from tandem.config import ServedModelConfig
from tandem.engine.spec import EngineSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContext:
    """One base's part of a run. Pickles into every reader and worker."""

    spec: EngineSpec
    served: ServedModelConfig
    """The same in the form of a served model's config, for the engine's rules for requests."""
    default: ResolvedModel
    """Who answers rows that name nobody."""
    targets: Mapping[str, ResolvedModel]
    """Who the names in rows mean."""
    request: Mapping[str, Any]
    """Fields for rows that lack them."""
    output: Output
    window_rows: int
    chat: bool = False
    """Whether prompts of plain rows are messages."""
    check_values: bool = True
    """Whether rows with values that no request can have are refused."""

    def ask(self, raw: bytes) -> tuple[RowRequest, ResolvedModel]:
        """A row's request, and who answers it. Raises BadRowError, KeyError for a name that means nobody."""
        ask = read_row(parse(raw), self.request, chat=self.chat, check_values=self.check_values)
        return ask, self.default if ask.model is None else self.targets[ask.model]

    def is_for_me(self, row: Row) -> bool:
        """Whether this base answers a row."""
        if row.problem is not None:
            return False
        try:
            return self.ask(row.raw)[1].base.id == self.spec.id
        except (BadRowError, KeyError):
            return False
