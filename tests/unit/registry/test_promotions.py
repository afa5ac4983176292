"""What a name means: promotions, roll-backs, removals and pins."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small_folders import small_adapter, small_model

from tandem.errors import RegistryError, UnknownModelError
from tandem.registry import Registry


@pytest.fixture
def versions(registry, model_folder, adapter_folder):
    """Registers versions of the adapter `red`, each with content of its own; `promote` as given."""
    registry.register_model("base", model_folder())

    def add(*promoted: bool):
        made = len(registry.list("adapter", all_versions=True))
        for number, promote in enumerate(promoted, made):
            folder = adapter_folder(f"red-{number}", bytes([number]))
            registry.register_adapter("red", folder, base="base", promote=promote)
        return registry

    return add


def test_a_name_means_its_newest_promoted_version_and_a_candidate_answers_by_its_id_only(versions):
    registry = versions(True, False)
    assert registry.resolve("red").id == "red@1"
    assert registry.resolve("red@2").version == 2
    assert [r.id for r in registry.list("adapter")] == ["red@1"]
    assert registry.promote("red@2").id == "red@2"
    assert registry.resolve("red").id == "red@2"
    assert [r.id for r in registry.list("adapter")] == ["red@2"]


def test_a_name_with_candidates_only_is_refused_with_the_way_to_promote_one(versions):
    registry = versions(False)
    with pytest.raises(UnknownModelError, match=r"No version of red is promoted; it has 1\..*promote red@1"):
        registry.resolve("red")


def test_each_roll_back_goes_one_promotion_further_back(versions):
    registry = versions(True, True, True)
    assert [registry.roll_back("red").id, registry.roll_back("red").id] == ["red@2", "red@1"]
    with pytest.raises(RegistryError, match="red@1 is the only version of red"):
        registry.roll_back("red")
    assert registry.resolve("red").id == "red@1"
    assert [(p.id, p.taken_back) for p in registry.promotions("red")] == [
        ("red@3", True),
        ("red@2", True),
        ("red@1", False),
    ]


def test_a_version_that_was_promoted_again_is_rolled_back_to_what_was_there_in_between(versions):
    registry = versions(True, True)
    registry.promote("red@1")
    assert registry.resolve("red").id == "red@1"
    assert registry.roll_back("red").id == "red@2"


def test_promoting_what_is_promoted_changes_nothing(versions):
    registry = versions(True)
    before = registry.revision()
    assert registry.promote("red@1").id == "red@1"
    assert registry.revision() == before and len(registry.promotions("red")) == 1


def test_registering_the_newest_content_again_promotes_it(versions, adapter_folder):
    registry = versions(True, True)
    registry.roll_back("red")
    assert registry.register_adapter("red", adapter_folder("red-1", bytes([1])), base="base").id == "red@2"
    assert registry.resolve("red").id == "red@2"


def test_a_promoted_version_that_is_removed_gives_way_to_the_one_before(versions):
    registry = versions(True, True, True)
    registry.remove("red@2")
    assert registry.resolve("red").id == "red@3"
    registry.remove("red@3")
    assert registry.resolve("red").id == "red@1"
    registry.remove("red@1")
    with pytest.raises(UnknownModelError):
        registry.resolve("red")


def test_a_name_and_a_version_are_not_taken_for_each_other(versions):
    registry = versions(True, True)
    with pytest.raises(RegistryError, match="Say which version of red"):
        registry.promote("red")
    with pytest.raises(RegistryError, match="A name is rolled back"):
        registry.roll_back("red@2")
    with pytest.raises(UnknownModelError):
        registry.roll_back("rde")


def test_a_pin_by_name_follows_the_promoted_version_and_one_by_id_does_not(versions):
    registry = versions(True)
    registry.pin("red")
    assert [r.id for r in registry.pinned("base@1")] == ["red@1"]
    registry.pin("red@1")
    versions(True)
    assert [r.id for r in registry.pinned("base@1")] == ["red@1", "red@2"]
    assert registry.pinned("other@1") == []
    assert registry.pins() == ["red", "red@1"]
    assert registry.unpin("red@1") and not registry.unpin("red@1")
    assert [r.id for r in registry.pinned("base@1")] == ["red@2"]


def test_pins_go_with_what_they_pin_and_a_model_is_not_pinned(versions):
    registry = versions(True, True)
    registry.pin("red")
    registry.pin("red@1")
    registry.remove("red@1")
    assert registry.pins() == ["red"]
    registry.remove("red")
    assert registry.pins() == []
    with pytest.raises(RegistryError, match="base@1 is a model"):
        registry.pin("base")
    with pytest.raises(UnknownModelError):
        registry.pin("red")


class Names(RuleBasedStateMachine):
    """One name against a model in a list: the promotions that stand, oldest first."""

    folders: ClassVar[dict[int, Path]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry("sqlite://")
        self.registry.register_model("base", self.folders[0])
        self.alive: set[int] = set()
        self.standing: list[int] = []
        self.made = 0

    @precondition(lambda self: self.made < 6)
    @rule(promote=st.booleans())
    def register(self, promote: bool) -> None:
        self.made += 1
        record = self.registry.register_adapter("red", self.folders[self.made], base="base", promote=promote)
        assert record.version == self.made
        self.alive.add(self.made)
        if promote:
            self.standing.append(self.made)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.alive)))
        self.registry.promote(f"red@{version}")
        if self.standing[-1:] != [version]:
            self.standing.append(version)

    @precondition(lambda self: len(set(self.standing)) > 1)
    @rule()
    def roll_back(self) -> None:
        now = self.standing[-1]
        while self.standing[-1] == now:
            self.standing.pop()
        assert self.registry.roll_back("red").version == self.standing[-1]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.alive)))
        self.registry.remove(f"red@{version}")
        self.alive.remove(version)
        self.standing = [each for each in self.standing if each != version]

    @invariant()
    def the_name_means_the_last_promotion_that_stands(self) -> None:
        listed = [record.version for record in self.registry.list("adapter")]
        assert listed == self.standing[-1:]
        if self.standing:
            assert self.registry.resolve("red").version == self.standing[-1]


def test_whatever_is_done_in_whatever_order_a_name_means_its_last_promotion_that_stands(tmp_path):
    Names.folders = {0: small_model(tmp_path / "base")}
    Names.folders |= {n: small_adapter(tmp_path / str(n), str(n)) for n in range(1, 7)}
    Names.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
    Names.TestCase().runTest()


@given(st.lists(st.sampled_from(["red", "blue", "reed", "zebra", "a"]), unique=True))
def test_near_names_are_registered_ones(wanted):
    registry = Registry("sqlite://")
    with registry._writing() as (session, _):
        from tandem.db.schema import NameRow

        session.add_all(NameRow(name=n, kind="adapter", last_version=1, promoted=f"{n}@1") for n in wanted)
    assert sorted(registry.near("red")) == sorted(wanted)
