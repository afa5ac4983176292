"""Waiting jobs of one tenant, in the order of priority and age, and grouped by shape.

Jobs of one shape need the same workers, and time limits of the same magnitude: if the first does not fit, the others need not be
looked at. An age of `aging_s` outweighs one priority level, so the order of two jobs never changes with time.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from tandem.jobs.scheduling.records import Job, Policy
from tandem.jobs.scheduling.resources import Resources


class Shape(NamedTuple):
    """What decides whether a job fits."""

    unit: Resources
    units: int
    """The fewest."""
    max_expected_s: float
    """A power of 2 that no job of the shape exceeds."""

    @property
    def min_expected_s(self) -> float:
        """Every job of the shape takes longer."""
        return self.max_expected_s / 2


class Position(NamedTuple):
    """Place of a job in its tenant's order."""

    aged_s: float
    """Time of submission, earlier by `aging_s` for each priority level."""
    job_id: str


def shape_of(job: Job, policy: Policy) -> Shape:
    """The shape of a job."""
    expected_s = max(1.0, job.expected_s(policy))
    return Shape(job.unit, job.min_workers // job.workers_per_node, 2.0 ** math.ceil(math.log2(expected_s)))


class TenantQueue:
    """Waiting jobs of one tenant."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._jobs: dict[str, Job] = {}
        self._shapes: dict[Shape, list[Position]] = {}
        self.head_since_s = 0.0
        """Time since which the first job has been the first."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __getitem__(self, job_id: str) -> Job:
        return self._jobs[job_id]

    def position(self, job: Job) -> Position:
        """Place of a job."""
        return Position(job.submitted_s - job.priority * self._policy.aging_s, job.id)

    def add(self, job: Job, now: float) -> None:
        """Queue a job."""
        head = self.head()
        self._jobs[job.id] = job
        insort(self._shapes.setdefault(shape_of(job, self._policy), []), self.position(job))
        self._note_head(head, now)

    def remove(self, job_id: str, now: float) -> Job:
        """Take a job out."""
        head = self.head()
        job = self._jobs.pop(job_id)
        shape = shape_of(job, self._policy)
        positions = self._shapes[shape]
        del positions[bisect_left(positions, self.position(job))]
        if not positions:
            del self._shapes[shape]
        self._note_head(head, now)
        return job

    def _note_head(self, before: Job | None, now: float) -> None:
        after = self.head()
        if after is not None and (before is None or before.id != after.id):
            self.head_since_s = now

    def head(self) -> Job | None:
        """The first job."""
        if not self._shapes:
            return None
        return self._jobs[min(positions[0] for positions in self._shapes.values()).job_id]

    def is_head(self, job: Job) -> bool:
        """Whether a job is the first."""
        head = self.head()
        return head is not None and head.id == job.id

    def ahead_of(self, job: Job) -> int:
        """Number of jobs before one."""
        position = self.position(job)
        return sum(bisect_left(positions, position) for positions in self._shapes.values())

    def jobs(self) -> Iterator[Job]:
        """All jobs, in their order."""
        for position in heapq.merge(*self._shapes.values()):
            yield self._jobs[position.job_id]

    def cursor(self) -> Cursor:
        """A reader of the jobs in their order."""
        return Cursor(self._jobs, self._shapes)


class Cursor:
    """Reads a queue in order. The queue must not change meanwhile."""

    __slots__ = ("_heap", "_jobs", "_shapes")

    def __init__(self, jobs: dict[str, Job], shapes: dict[Shape, list[Position]]) -> None:
        self._jobs = jobs
        self._shapes = shapes
        # Equal positions do not occur, so shapes are never compared.
        self._heap = [(positions[0], 0, shape) for shape, positions in shapes.items()]
        heapq.heapify(self._heap)

    def peek(self) -> tuple[Job, Shape] | None:
        """The next job; None at the end."""
        if not self._heap:
            return None
        position, _, shape = self._heap[0]
        return self._jobs[position.job_id], shape

    def skip_job(self) -> None:
        """Go on to the job after the next."""
        _, place, shape = self._heap[0]
        positions = self._shapes[shape]
        if place + 1 < len(positions):
            heapq.heapreplace(self._heap, (positions[place + 1], place + 1, shape))
        else:
            heapq.heappop(self._heap)

    def skip_shape(self) -> None:
        """Leave out the next job and all later ones of its shape."""
        heapq.heappop(self._heap)
