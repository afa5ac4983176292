"""Chores of the process that leads: regular work beside its jobs, at the begin of each term and then at intervals."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from tandem.errors import LeaseLostError, TandemError
from tandem.jobs.work.leader import Term

log = logging.getLogger(__name__)


class Chore(Protocol):
    """One kind of regular work."""

    every_s: float

    def run(self, term: Term) -> bool:
        """Do a part that takes a few seconds at most; whether more is left, which is done in the next round.

        Writes are fenced by the term: LeaseLostError where it has ended.
        """
        ...


class Chores:
    """Several chores, each with its own interval."""

    def __init__(self, chores: Sequence[Chore]) -> None:
        self._chores = chores
        self._term: Term | None = None
        self._due_at: dict[int, float] = {}
        """Monotonic clock, by the place of the chore."""

    def run(self, term: Term) -> None:
        """Do what is due. What one refuses delays no other, and is tried again at its next time; LeaseLostError ends all."""
        if term != self._term:
            self._term, self._due_at = term, {}
        for place, chore in enumerate(self._chores):
            if time.monotonic() < self._due_at.get(place, 0.0):
                continue
            has_more = False
            try:
                has_more = chore.run(term)
            except LeaseLostError:
                raise
            except TandemError as error:
                log.warning("%s It is tried again in %g s.", error, chore.every_s)
            except Exception:
                log.exception("%s is at fault; it is tried again in %g s.", type(chore).__name__, chore.every_s)
            self._due_at[place] = time.monotonic() + (0.0 if has_more else chore.every_s)
