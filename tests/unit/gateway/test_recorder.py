"""The recorder of answers: bounded bytes, a database that is away, answers written when the gateway ends."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.config import StoredConfig
from tandem.gateway.stored.recorder import Recorder
from tandem.gateway.stored.recording import AnswerLabels, PendingBytes, Recorded, Recording
from tandem.registry import Registry
from tandem.stored.records import AnswerKind
from tandem.stored.store import StoredAnswers

LABELS = AnswerLabels(
    kind=AnswerKind.RESPONSE, tenant="lab", key_id="k", model="base", metadata={}, previous_id="resp_0"
)


@pytest.fixture
async def recorder(tmp_path: Path) -> Recorder:
    store = StoredAnswers.at(Registry(f"sqlite:///{tmp_path}/tandem.db").address)
    return Recorder(store, StoredConfig())


def record(recorder: Recorder, id_: str) -> None:
    recording = recorder.open(LABELS, b'{"input":"x"}')
    for part in (b'{"id":"', id_.encode(), b'"}'):
        recording.add(part)
    recording.complete(is_stream=False)
    recording.close()


async def written(recorder: Recorder) -> None:
    async with asyncio.timeout(60):
        while recorder.is_recording("lab"):
            await asyncio.sleep(0.01)


async def test_answers_wait_while_the_database_is_locked_and_are_written_in_their_order(
    recorder: Recorder, tmp_path: Path
) -> None:
    recorder.start()
    lock = sqlite3.connect(tmp_path / "tandem.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    for number in range(3):
        record(recorder, f"r{number}")
    await asyncio.sleep(0.1)
    assert recorder.awaits_write("lab"), "nobody waits for it but readers"
    lock.execute("ROLLBACK")
    lock.close()
    await written(recorder)
    await recorder.stop()
    with StoredAnswers(f"sqlite:///{tmp_path}/tandem.db") as store:
        found = store.get("lab", AnswerKind.RESPONSE, "r2")
    assert found is not None and found.previous_id == found.answer["previous_response_id"] == "resp_0"
    assert recorder.lost.total() == 0


async def test_what_is_whole_when_the_gateway_ends_is_written(recorder: Recorder, tmp_path: Path) -> None:
    record(recorder, "r0")
    await recorder.stop()
    with StoredAnswers(f"sqlite:///{tmp_path}/tandem.db") as store:
        assert store.get("lab", AnswerKind.RESPONSE, "r0") is not None


async def test_an_answer_that_cannot_be_read_is_counted_and_does_not_stop_the_next(recorder: Recorder) -> None:
    recorder.start()
    for id_ in ("", "a" * 129, '"', "good"):
        record(recorder, id_)
    await written(recorder)
    await recorder.stop()
    assert recorder.lost == {"unreadable": 3}


@given(
    answers=st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=5), st.booleans(), st.booleans()), min_size=1, max_size=8
    )
)
def test_bytes_are_held_within_the_limits_and_all_given_back(answers: list[tuple[list[int], bool, bool]]) -> None:
    pending, done = PendingBytes(120), []

    def ended(recording: Recording, recorded: Recorded | None) -> None:
        done.append(recorded)

    recordings = [
        Recording(LABELS, b"x" * 10, max_bytes=80, pending=pending, on_end=ended) for _ in range(len(answers))
    ]
    for recording, (chunks, completes, _) in zip(recordings, answers, strict=True):
        for size in chunks:
            recording.add(b"y" * size)
            assert 0 <= pending.held <= 120
        if completes:
            recording.complete(is_stream=False)
        recording.close()
        recording.close()
    assert len(done) == len(answers), "each ends once"
    whole = [each for each in done if each is not None]
    assert all(each.num_bytes == 10 + sum(map(len, each.chunks)) <= 80 for each in whole)
    for each in whole:
        pending.give_back(each.num_bytes)
    assert pending.held == 0
