"""Admission queue under overload, with a simulated engine and clock."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tandem.gateway.admission.queue import Outcome, Queue, SchedulingHints, Ticket

BATCH, LIMIT = 32, 40
STEP_S, SEQUENCE_S = 0.002, 0.00005
"""A step of the engine takes so long, and so much more for each sequence in it."""
LENGTHS = (16, 32, 64)
CAPACITY = BATCH / (STEP_S + BATCH * SEQUENCE_S) / (sum(LENGTHS) / len(LENGTHS))
"""Requests that it answers in a second."""
ANSWER_S = BATCH / CAPACITY
SECONDS = 40.0


@dataclass
class Engine:
    """Takes what it is given, in order, `BATCH` at a time; what is late is cut off."""

    queue: Queue
    inside: list[Ticket] = field(default_factory=list)
    left: dict[Ticket, int] = field(default_factory=dict)

    def step_s(self) -> float:
        return STEP_S + min(BATCH, len(self.inside)) * SEQUENCE_S

    def step(self, now: float) -> list[Ticket]:
        """Those whose answer is whole now."""
        complete = []
        for ticket in self.inside[:BATCH]:
            self.left[ticket] -= 1
            if not self.left[ticket]:
                complete.append(ticket)
        for ticket in [t for t in self.inside if t in complete or now > t.hints.finish_by]:
            self.inside.remove(ticket)
            self.queue.ended(ticket, now, complete=ticket in complete)
        return complete


def in_time(load: float, patience: float, *, told: bool = True) -> tuple[float, Counter[int]]:
    """Tokens/s answered in time, as a share of what the engine can do, at `load` times its capacity; and answers by length.

    Requests have `patience` times an answer's time; where the queue is not `told`, only their clients know.
    """
    dice, queue = random.Random(0), Queue(max_waiting=1000, hold_s=0.0)
    queue.set_limit(LIMIT, 0.0)
    engine = Engine(queue)
    lengths: dict[Ticket, int] = {}
    answered: Counter[int] = Counter()
    now, due, swept = 0.0, 0.0, 0.0
    while now < SECONDS:
        end = now + engine.step_s()
        while due < end:
            length = dice.choice(LENGTHS)
            by = due + patience * ANSWER_S
            ticket = Ticket(SchedulingHints(arrived=due, finish_by=by if told else math.inf, kind=length.bit_length()))
            lengths[ticket] = engine.left[ticket] = length
            if queue.enter(ticket, due)[0] is Outcome.START:
                engine.inside.append(ticket)
            due += dice.expovariate(load * CAPACITY)
        now = end
        for ticket in engine.step(now):
            if now > SECONDS / 4 and now <= ticket.hints.arrived + patience * ANSWER_S:
                answered[lengths[ticket]] += 1
        if now > swept + 0.1:
            swept = now
            queue.pop_overdue(now)
        engine.inside += [ticket for ticket, outcome in queue.pop_startable(now) if outcome is Outcome.START]
    tokens = sum(length * count for length, count in answered.items()) / (0.75 * SECONDS)
    return tokens / CAPACITY / (sum(LENGTHS) / len(LENGTHS)), answered


@pytest.mark.parametrize("patience", [4.0, 10.0])
@pytest.mark.parametrize("load", [1.0, 2.0, 4.0])
def test_overload_does_not_reduce_the_completed_work(load: float, patience: float) -> None:
    assert in_time(load, patience)[0] > 0.9


def test_long_and_short_answers_have_equal_shares_under_overload() -> None:
    _, answered = in_time(4.0, 10.0)
    assert min(answered.values()) > 0.8 * max(answered.values()) and len(answered) == len(LENGTHS)


def test_a_queue_without_deadlines_completes_less_under_overload() -> None:
    assert in_time(2.0, 10.0, told=False)[0] < 0.5
