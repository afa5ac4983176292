"""Answers of a gateway about the models of batches: as a client's request would be answered, and once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from tandem.auth.principal import Principal, Role
from tandem.gateway.errors import no_registry, unknown_model
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.work.model_answers import ModelAnswers
from tandem.jobs.batches.model_checks import ModelChecks, ModelQuestion, Refusal


class Questions:
    """Open questions, and the answers to them."""

    def __init__(self, *questions: ModelQuestion) -> None:
        self.open = list(questions)
        self.answers: list[tuple[str, Refusal | None]] = []

    def unanswered(self) -> Sequence[ModelQuestion]:
        return list(self.open)

    def answer(self, question: ModelQuestion, refusal: Refusal | None) -> None:
        self.answers.append((question.model, refusal))


class Unresolved:
    """A catalog that answers with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def resolve(self, name: str, principal: Principal) -> Any:
        raise self.error


def question(model: str) -> ModelQuestion:
    return ModelQuestion("batch_1", model, "/v1/completions", "red", "key-1", ())


def principal(key_id: str, tenant: str, models: tuple[str, ...]) -> Principal:
    return Principal(key_id=key_id, tenant=tenant, role=Role.USER, models=models)


def answers(questions: Questions, error: Exception, principal_of: Any = principal) -> ModelAnswers:
    return ModelAnswers(cast(ModelChecks, questions), cast(Catalog, Unresolved(error)), {}, principal_of, lambda: None)


async def test_a_model_that_the_key_cannot_use_is_refused_once_with_the_gateways_error() -> None:
    questions = Questions(question("a"), question("b"))
    service = answers(questions, unknown_model("There is none."))
    for _ in range(2):
        await service.answer_open()
    refusal = Refusal("model_not_found", "There is none.")
    assert questions.answers == [("a", refusal), ("b", refusal)]
    # A batch that asks again, as after a restart of the dispatcher, is answered again.
    questions.open = []
    await service.answer_open()
    questions.open = [question("a")]
    await service.answer_open()
    assert questions.answers[2:] == [("a", refusal)]


async def test_nothing_is_answered_while_the_registry_is_away() -> None:
    questions = Questions(question("a"))
    service = answers(questions, no_registry("The registry does not answer", 5))
    for _ in range(2):
        await service.answer_open()
    assert questions.answers == []


async def test_requests_of_a_key_that_has_ended_say_so_themselves() -> None:
    questions = Questions(question("a"))
    await answers(questions, unknown_model("There is none."), lambda *call: None).answer_open()
    assert questions.answers == [("a", None)]
