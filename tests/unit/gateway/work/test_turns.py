"""Turns of models and tenants in batches."""

from __future__ import annotations

from tandem.gateway.work.turns import MODELS_AT_ONCE, TURN_S, ModelTurns, shares


def test_few_models_send_at_once_and_each_gets_a_turn() -> None:
    turns, models, served = ModelTurns(), list("abcde"), set()
    for step in range(10):
        allowed = turns.allowed(models, [], now=step * TURN_S)
        assert len(allowed) == MODELS_AT_ONCE
        served |= set(allowed)
        if step == 2:
            assert served == set(models)


def test_a_model_keeps_its_turn_while_no_other_waits() -> None:
    turns = ModelTurns()
    assert turns.allowed(["a", "b"], [], 0.0) == ["a", "b"]
    assert turns.allowed(["a"], ["a"], 10 * TURN_S) == ["a"]
    assert turns.allowed(["a", "c"], ["a"], 10 * TURN_S + 1) == ["c", "a"]


def test_a_model_waits_for_the_requests_of_the_one_before() -> None:
    turns = ModelTurns()
    assert turns.allowed(["a", "b", "c"], [], 0.0) == ["a", "b"]
    assert turns.allowed(["a", "b", "c"], ["a", "b"], TURN_S) == []
    assert turns.allowed(["a", "b", "c"], ["b"], TURN_S + 1) == ["c"]


def test_room_is_shared_so_that_tenants_have_equally_many_under_way() -> None:
    assert shares(6, {"a": 4, "b": 0, "c": 1}) == {"b": 4, "c": 2}
    assert shares(1, {"b": 0, "a": 0}) == {"b": 1}
    assert shares(0, {"a": 0}) == {} == shares(5, {})
