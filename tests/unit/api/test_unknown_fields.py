"""Messages about unknown fields of requests."""

from __future__ import annotations

import pytest

from tandem.api import unknown_fields
from tandem.api.unknown_fields import MAX_NAME_CHARS, describe, misspelt_fields

PATH = "/v1/completions"


def test_a_repeated_unknown_field_is_compared_with_the_known_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def count(word: str, known: object) -> str:
        compared.append(word)
        return " Did you mean 'temperature'?"

    monkeypatch.setattr(unknown_fields, "did_you_mean", count)
    field = "temperaturr"
    for _ in range(3):
        assert describe(PATH, [field]) == "unknown field 'temperaturr'; did you mean 'temperature'?"
        assert misspelt_fields(PATH, [field]) == [field]
    assert compared == [field]
    unknown_fields._nearest_field.cache_clear()


def test_memory_for_unknown_fields_is_bounded() -> None:
    assert unknown_fields._nearest_field.cache_parameters()["maxsize"] == 1024
    before = unknown_fields._nearest_field.cache_info().currsize
    describe(PATH, ["t" * (MAX_NAME_CHARS + 1)])
    assert unknown_fields._nearest_field.cache_info().currsize == before
