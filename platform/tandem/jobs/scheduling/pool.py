"""Free CPUs and GPUs of all nodes, and packing of gangs onto few nodes. Vectorised over nodes; copies are cheap."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tandem.jobs.scheduling.records import Placement
from tandem.jobs.scheduling.resources import TOLERANCE, Resources

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Pool:
    """Amounts that are free on each node. Nodes are numbered in the order of `ids`; amounts may become negative."""

    __slots__ = ("_slots", "cpus", "gpus", "ids", "numbers")

    def __init__(self, ids: tuple[str, ...], numbers: dict[str, int], cpus: Floats, gpus: Floats) -> None:
        self.ids = ids
        self.numbers = numbers
        self.cpus = cpus
        self.gpus = gpus
        self._slots: dict[Resources, tuple[Ints, int]] = {}

    @staticmethod
    def of(nodes: Iterable[tuple[str, Resources]]) -> Pool:
        """A pool with these free amounts; sorted by id, so that equal states give equal placements."""
        ordered = sorted(nodes, key=lambda node: node[0])
        ids = tuple(node_id for node_id, _ in ordered)
        cpus = np.array([free.cpus for _, free in ordered], dtype=np.float64)
        gpus = np.array([free.gpus for _, free in ordered], dtype=np.float64)
        return Pool(ids, {node_id: number for number, node_id in enumerate(ids)}, cpus, gpus)

    def copy(self) -> Pool:
        """A pool that changes by itself."""
        return Pool(self.ids, self.numbers, self.cpus.copy(), self.gpus.copy())

    def minus(self, other: Pool) -> Pool:
        """A pool with the amounts of `other`, of the same nodes, taken away."""
        return Pool(self.ids, self.numbers, self.cpus - other.cpus, self.gpus - other.gpus)

    def least(self, other: Pool) -> Pool:
        """A pool with the smaller amount of both on each node."""
        return Pool(self.ids, self.numbers, np.minimum(self.cpus, other.cpus), np.minimum(self.gpus, other.gpus))

    @property
    def total(self) -> Resources:
        """Sum over all nodes."""
        return Resources(float(self.cpus.sum()), float(self.gpus.sum()))

    def free(self, node_id: str) -> Resources:
        """Free amounts of one node."""
        number = self.numbers[node_id]
        return Resources(float(self.cpus[number]), float(self.gpus[number]))

    def take(self, node_id: str, amount: Resources) -> None:
        """Take an amount from a node that is in the pool; others are ignored, so that work on lost nodes can end."""
        self._add(node_id, amount, -1.0)

    def give(self, node_id: str, amount: Resources) -> None:
        """Return an amount to a node."""
        self._add(node_id, amount, 1.0)

    def take_all(self, placement: Placement, worker: Resources) -> None:
        """Take the workers of a placement."""
        for node_id, workers in placement:
            self._add(node_id, worker, -workers)

    def give_all(self, placement: Placement, worker: Resources) -> None:
        """Return the workers of a placement."""
        for node_id, workers in placement:
            self._add(node_id, worker, workers)

    def _add(self, node_id: str, amount: Resources, count: float) -> None:
        number = self.numbers.get(node_id)
        if number is None:
            return
        self.cpus[number] += count * amount.cpus
        self.gpus[number] += count * amount.gpus
        for unit, (slots, total) in self._slots.items():
            changed = self._slots_of(number, unit)
            if changed != slots[number]:
                self._slots[unit] = slots, total + changed - int(slots[number])
                slots[number] = changed

    def _slots_of(self, number: int, unit: Resources) -> int:
        fits = float("inf")
        if unit.cpus > 0:
            fits = (float(self.cpus[number]) + TOLERANCE) // unit.cpus
        if unit.gpus > 0:
            fits = min(fits, (float(self.gpus[number]) + TOLERANCE) // unit.gpus)
        return max(0, int(fits))

    def slots(self, unit: Resources) -> int:
        """Number of units that fit, each on one node."""
        return self._slots_by_node(unit)[1]

    def _slots_by_node(self, unit: Resources) -> tuple[Ints, int]:
        known = self._slots.get(unit)
        if known is None:
            fits = np.full(len(self.ids), np.inf)
            if unit.cpus > 0:
                fits = (self.cpus + TOLERANCE) // unit.cpus
            if unit.gpus > 0:
                fits = np.minimum(fits, (self.gpus + TOLERANCE) // unit.gpus)
            slots: Ints = np.maximum(fits, 0).astype(np.int64)
            known = self._slots[unit] = slots, int(slots.sum())
        return known

    def pack(self, unit: Resources, units: int) -> dict[str, int] | None:
        """Units on each node for a gang of `units`, on as few nodes as possible; None: they do not all fit.

        One node that holds all takes them, the fullest such; else the emptiest nodes are filled first, and the rest goes to the
        fullest node that holds it. So holes are filled before whole nodes are broken up.
        """
        slots, total = self._slots_by_node(unit)
        if total < units:
            return None
        chosen: dict[str, int] = {}
        left = units
        order: Ints | None = None
        place = 0
        while left:
            candidates = np.flatnonzero(slots >= left)
            if chosen and candidates.size:
                candidates = candidates[[self.ids[number] not in chosen for number in candidates]]
            if candidates.size:
                number = int(candidates[np.lexsort((candidates, self._leftover(candidates), slots[candidates]))[0]])
                chosen[self.ids[number]] = left
                return chosen
            if order is None:
                order = np.argsort(-slots, kind="stable")
            number = int(order[place])
            place += 1
            chosen[self.ids[number]] = int(slots[number])
            left -= int(slots[number])
        return chosen

    def _leftover(self, candidates: Ints) -> Floats:
        # Among nodes with equally many slots, the one with less of everything.
        leftover: Floats = self.gpus[candidates] + 1e-3 * self.cpus[candidates]
        return leftover
