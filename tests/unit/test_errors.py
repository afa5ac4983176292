"""Suggestions in errors: near names, in a bounded time."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.api.request_fields import REQUEST_FIELDS
from tandem.errors import LONGEST_COMPARED, MOST_COMPARED, did_you_mean

FIELDS = sorted(set(itertools.chain.from_iterable(REQUEST_FIELDS.values())))


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("temperatur", "temperature"),
        ("max_token", "max_tokens"),
        ("stram", "stream"),
        ("mesages", "messages"),
        ("frequency_penality", "frequency_penalty"),
        ("chat_template_kwarg", "chat_template_kwargs"),
        ("n_", "n"),
    ],
)
def test_the_nearest_of_many_names_is_suggested(word: str, near: str) -> None:
    assert did_you_mean(word, FIELDS) == f" Did you mean {near!r}?"


def test_nothing_is_suggested_for_a_word_like_none_or_a_long_one() -> None:
    assert did_you_mean("zzzzqqqq", FIELDS) == "" and did_you_mean("", FIELDS) == ""
    assert did_you_mean("temperature" * 20, FIELDS) == "" and did_you_mean("x", []) == ""


def test_few_names_are_compared_letter_by_letter_however_many_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def matches(word: str, names: list[str], **options: Any) -> list[str]:
        compared.append(len(names))
        return []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            yield f"adapter-{number}"

    monkeypatch.setattr(difflib, "get_close_matches", matches)
    did_you_mean("a" * LONGEST_COMPARED, endless())
    assert compared == [MOST_COMPARED]
