"""Adapter residency for any order of requests."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.serve.replica.residency import MAX_OVERTAKEN, Residency, Waiter

IDS = [f"a{i}@1" for i in range(8)]


def used(books: Residency, *adapters: str) -> None:
    """Requests that came, were answered, and left."""
    for adapter in adapters:
        assert books.arrive(adapter) is None
        if adapter not in books.loaded:
            if (victim := books.eviction_candidate()) is not None:
                books.discard(victim)
            books.add(adapter)
        books.leave(adapter)


def test_adapters_stay_in_memory_and_the_least_recently_used_is_evicted() -> None:
    books = Residency(slots=2, cached=4)
    used(books, "a", "b", "c", "d", "a")
    assert list(books.loaded) == ["b", "c", "d", "a"]
    assert books.in_slots == ("d", "a")
    assert books.eviction_candidate() == "b"


def test_used_and_pinned_adapters_are_never_evicted() -> None:
    books = Residency(slots=2, cached=3)
    used(books, "a", "b", "c")
    books.pin(["a"])
    assert books.arrive("b") is None
    assert books.eviction_candidate() == "c"
    assert books.arrive("c") is None
    assert books.eviction_candidate() is None and books.full


def test_a_batch_never_needs_more_adapters_than_there_are_slots() -> None:
    books = Residency(slots=2, cached=9)
    assert books.arrive("a") is books.arrive("b") is books.arrive("a") is None
    third = books.arrive("c")
    assert third is not None
    books.leave("a")
    assert books.admit() == []
    books.leave("b")
    assert books.admit() == [third] and books.users == {"a": 1, "c": 1}


def test_pinned_adapters_leave_one_place_free() -> None:
    books = Residency(slots=2, cached=2)
    assert books.pin(["a", "b", "c"]) == ("b", "c")
    assert books.pinned == ("a",)
    assert books.arrive("x") is None and books.arrive("y") is not None


def test_a_waiting_request_is_overtaken_by_a_bounded_number_of_others() -> None:
    books = Residency(slots=1, cached=1)
    assert books.arrive("hot") is None
    waiter = books.arrive("cold")
    assert waiter is not None
    passed = 0
    while (later := books.arrive("hot")) is None:
        passed += 1
    assert passed == MAX_OVERTAKEN
    for _ in range(passed + 1):
        books.leave("hot")
    assert books.admit() == [waiter]
    books.leave("cold")
    assert books.admit() == [later]


class Books(RuleBasedStateMachine):
    """Requests come, wait, load, leave and give up, and pins change, in any order."""

    @initialize(slots=st.integers(1, 4), more=st.integers(0, 4))
    def begin(self, slots: int, more: int) -> None:
        self.books = Residency(slots, slots + more)
        self.running: list[str] = []
        self.queue: list[Waiter] = []

    def admitted(self) -> None:
        for waiter in self.books.admit():
            self.queue.remove(waiter)
            self.running.append(waiter.adapter)

    @rule(adapter=st.sampled_from(IDS))
    def arrive(self, adapter: str) -> None:
        waiter = self.books.arrive(adapter)
        if waiter is None:
            self.running.append(adapter)
        else:
            self.queue.append(waiter)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.running))
        self.running.remove(adapter)
        self.books.leave(adapter)
        self.admitted()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def stop_waiting(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.queue))
        self.queue.remove(waiter)
        self.books.stop_waiting(waiter)
        self.admitted()

    @precondition(lambda self: set(self.running) - set(self.books.loaded))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(sorted(set(self.running) - set(self.books.loaded))))
        victim = self.books.eviction_candidate()
        if victim is None and self.books.full:
            # Only where pins came after those who run.
            assert len({*self.running, *self.books.pinned}) > self.books.cached
            return
        if victim is not None:
            assert victim not in self.running and victim not in self.books.pinned
            self.books.discard(victim)
        self.books.add(adapter)

    @rule(pins=st.lists(st.sampled_from(IDS), max_size=4))
    def pin(self, pins: list[str]) -> None:
        self.books.pin(pins)
        self.admitted()

    @invariant()
    def the_engine_is_never_asked_for_too_much(self) -> None:
        books = self.books
        assert len(books.loaded) <= books.cached
        assert set(books.users) == set(self.running) and len(books.users) <= books.slots
        assert set(books.in_slots) >= set(books.loaded) & set(self.running)
        assert len(books.in_slots) <= books.slots
        assert all(waiter.overtaken_by <= MAX_OVERTAKEN for waiter in books.waiting)
        assert list(books.waiting) == self.queue

    def teardown(self) -> None:
        if not hasattr(self, "books"):
            return
        # Whoever waits gets in, once those before have left.
        self.books.pin([])
        self.admitted()
        while self.running:
            self.books.leave(self.running.pop())
            self.admitted()
        assert not self.queue and not self.books.waiting


Books.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_books_hold_in_any_order = Books.TestCase
