"""Conditions of promotions and roll-backs: what a name must mean, and changes that are made once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.errors import ChangedMeanwhileError
from tandem.registry import Registry, conditions
from tandem.registry.conditions import Condition

MakeFolder = Callable[..., Path]


@pytest.fixture
def filled(registry: Registry, model_folder: MakeFolder, adapter_folder: MakeFolder) -> Registry:
    """A registry in which `red` has had three versions, promoted one after the other."""
    registry.register_model("base", model_folder())
    for number in range(3):
        folder = adapter_folder(f"red-{number}", weights=str(number).encode())
        registry.register_adapter("red", folder, base="base")
    return registry


def test_a_change_that_expects_another_version_is_refused_and_changes_nothing(filled: Registry) -> None:
    before = filled.revision()
    for change in (lambda c: filled.promote("red@1", c), lambda c: filled.roll_back("red", c)):
        with pytest.raises(ChangedMeanwhileError, match=r"red means red@3 now, and the change expects red@2"):
            change(Condition(expected="red@2"))
    assert filled.resolve("red").id == "red@3" and filled.revision() == before
    assert filled.roll_back("red", Condition(expected="red@3")).id == "red@2"
    assert filled.promote("red@1", Condition(expected="red@2")).id == "red@1"


def test_a_roll_back_sent_twice_with_one_key_happens_once(filled: Registry) -> None:
    once = Condition(once="a" * 64)
    assert [filled.roll_back("red", once).id for _ in range(3)] == ["red@2"] * 3
    assert filled.resolve("red").id == "red@2"
    assert filled.roll_back("red", Condition(once="b" * 64)).id == "red@1"


def test_a_promotion_sent_again_does_not_undo_what_came_after_it(filled: Registry) -> None:
    once = Condition(once="a" * 64)
    filled.promote("red@1", once)
    filled.promote("red@2")
    assert filled.promote("red@1", once).id == "red@1"
    assert filled.resolve("red").id == "red@2"


def test_the_same_key_at_the_same_moment_changes_something_once(filled: Registry) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: filled.roll_back("red", Condition(once="a" * 64)).id, range(4)))
    assert found == ["red@2"] * 4 and filled.resolve("red").id == "red@2"


def test_a_key_whose_change_failed_can_be_used_again(filled: Registry) -> None:
    wrong = Condition(expected="red@1", once="a" * 64)
    with pytest.raises(ChangedMeanwhileError):
        filled.roll_back("red", wrong)
    assert filled.roll_back("red", Condition(once="a" * 64)).id == "red@2"


def test_a_key_is_forgotten_after_its_time(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "RETENTION_S", 0)
    once = Condition(once="a" * 64)
    assert [filled.roll_back("red", once).id for _ in range(2)] == ["red@2", "red@1"]
