"""Round-robin of models and tenants over the engines of one base. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TypeVar

G = TypeVar("G", bound=Hashable)

MODELS_AT_ONCE = 2
"""Models of one base, adapters or itself, whose requests are under way together: adapters are not loaded back and forth."""
TURN_S = 30.0
"""Seconds for which a model keeps its turn while others of its base wait."""


class ModelTurns:
    """Decides which models of one base may send requests of batches: each for a while, then those that have waited longest."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        """When the models that have a turn got it, in monotonic seconds."""
        self._ended: dict[str, float] = {}
        """When waiting models had their last turn."""

    def allowed(self, waiting: Collection[str], under_way: Iterable[str], now: float) -> list[str]:
        """The models among `waiting` that may send now; `under_way`: those with requests that are not answered."""
        busy = set(under_way)
        others_wait = any(model not in self._began for model in waiting)
        for model, began in list(self._began.items()):
            is_over = now - began >= TURN_S and others_wait
            if is_over or (model not in waiting and model not in busy):
                del self._began[model]
                self._ended[model] = now
        self._ended = {model: ended for model, ended in self._ended.items() if model in waiting}
        without_turn = (model for model in waiting if model not in self._began)
        for model in sorted(without_turn, key=lambda model: self._ended.get(model, -math.inf)):
            if len((busy | self._began.keys()) - {model}) >= MODELS_AT_ONCE:
                break  # nor may those that have waited less long
            self._began[model] = now
        return [model for model in self._began if model in waiting]


def shares(capacity: int, under_way: Mapping[G, int]) -> dict[G, int]:
    """How many of `capacity` more requests each group may send, so that all come to have as many under way as is possible.

    `under_way`: the requests of each group that waits; of groups with equally many the first comes first.
    """
    given = dict.fromkeys(under_way, 0)
    for _ in range(capacity if given else 0):
        given[min(given, key=lambda group: under_way[group] + given[group])] += 1
    return {group: count for group, count in given.items() if count}
