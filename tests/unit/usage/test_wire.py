"""Counts at the end of a stream, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.usage import TokenCounts
from tandem.usage.wire import StreamCounts, counts_to_comment

EVENTS = b'data: {"text": ": 1 2"}\n\ndata: [DONE]\n\n'
COUNTS = TokenCounts(12, 345)
WHOLE = EVENTS + counts_to_comment(COUNTS)


def passed(stream: StreamCounts, *chunks: bytes) -> bytes:
    return b"".join(map(stream.without_comment, chunks))


@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
def test_the_comment_is_read_and_removed_wherever_it_is_cut(cut: int):
    stream = StreamCounts()
    assert passed(stream, WHOLE[:cut], WHOLE[cut:]) == EVENTS
    assert stream.counts == COUNTS


def test_the_comment_may_come_byte_by_byte():
    stream = StreamCounts()
    assert passed(stream, *(WHOLE[n : n + 1] for n in range(len(WHOLE)))) == EVENTS
    assert stream.counts == COUNTS


def test_other_comments_pass():
    stream = StreamCounts()
    chunks = (b": ping\n", b"\ndata: 1\n\n:", b" " * 100, b"\n\n: 1 2 other\n\n")
    assert passed(stream, *chunks) == b"".join(chunks)
    assert stream.counts is None


def test_chunks_that_end_with_an_event_are_not_copied():
    stream = StreamCounts()
    assert stream.without_comment(EVENTS) is EVENTS


@given(st.lists(st.sampled_from([b":", b" ", b"1", b"\n", b"data: x", b" tandem-usage\n\n"]), max_size=30))
def test_no_byte_is_lost_but_comments(chunks: list[bytes]):
    stream = StreamCounts()
    whole, kept = b"".join(chunks), passed(stream, *chunks)
    position = 0
    for byte in kept:  # what passes is a subsequence of what came
        position = whole.index(byte, position) + 1
    if b"tandem-usage" not in whole:
        assert whole.startswith(kept) and whole[len(kept) :][:1] in (b"", b":")
