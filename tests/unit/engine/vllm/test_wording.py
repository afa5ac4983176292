"""Error messages of vLLM and pydantic, rewritten for clients."""

from __future__ import annotations

import ast
import json
import logging
from types import SimpleNamespace
from typing import Annotated

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from tandem.config import ServedModelConfig
from tandem.engine.vllm import wording
from tandem.engine.vllm.logs import ANTHROPIC_LOGGER, quiet_refusals
from tandem.engine.vllm.parsers import explain_refusal
from tandem.engine.vllm.requests import explain_error
from tandem.engine.vllm.wording import (
    ADVICE_TO_DEPLOYER,
    MAX_FIELDS,
    MAX_MESSAGE_CHARS,
    simplify_field,
    simplify_message,
)
from tandem.gateway.dialect import OPENAI, rewrite_errors
from tandem.gateway.errors import LONGEST_MESSAGE, LONGEST_PARAM, from_engine
from tandem.routing.records import ServedModel

MODEL = ServedModel(id="m@1", name="m", path="", config=ServedModelConfig(model="m", engine="vllm"), max_length=2048)


class Part(BaseModel):
    type: str
    text: str


class Request(BaseModel):
    max_tokens: int = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    messages: list[str | Part] = []
    temperature: float = 1.0
    top_p: float = 1.0


def vllm_says(**body: object) -> str:
    """What vLLM's handler of FastAPI's validation errors makes of pydantic's."""
    try:
        Request(**body)  # type: ignore[arg-type]
    except ValidationError as error:
        found = RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]).errors()
        lines = "".join(f"  {each}\n" for each in found)
        return f"{len(found)} validation error{'s' * (len(found) > 1)}:\n{lines}".rstrip()
    raise AssertionError("it is valid")


def test_a_wrong_type_names_the_field_without_pydantics_terms() -> None:
    raw = vllm_says(max_tokens="x")
    assert "int_parsing" in raw
    assert simplify_message(raw) == "max_tokens: Input should be a valid integer, unable to parse string as an integer."


def test_a_field_of_several_types_is_named_once() -> None:
    said = simplify_message(vllm_says(stop=5, messages=["a", {"type": 3, "text": "it's (so)"}]))
    assert said.startswith("stop: Input should be a valid string; messages.1: ")
    assert "Part" not in said and "loc" not in said


def test_too_many_stop_texts_are_told_with_the_limit() -> None:
    said = simplify_message(vllm_says(stop=["a"] * 5))
    assert said == "stop: List should have at most 4 items after validation, not 5."


def test_more_than_three_fields_are_not_listed() -> None:
    said = simplify_message(vllm_says(max_tokens="x", stop=5, temperature="hot", top_p="all", messages="none"))
    assert said.count(":") == 3 and said.endswith("; and more.")


def test_a_message_with_quotes_and_brackets_is_read_whole() -> None:
    raw = """1 validation error:
  {'type': 'value_error', 'loc': ('body', 'function-wrap[__log_extra_fields__()]', 'prompt'), 'msg': "Value error, it's (not) {this}.", 'input': {}, 'ctx': {'error': ValueError("it's")}}"""  # noqa: E501
    assert simplify_message(raw) == "prompt: it's (not) {this}."


def test_other_messages_stay_unchanged() -> None:
    for message in ("1 validation error:\n  something", "The prompt is empty.", ""):
        assert simplify_message(message) == message


def test_limits_do_not_advise_clients_to_set_variables_of_the_server() -> None:
    raw = (
        "n must be at most 16384, got 20000. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
    )
    error = from_engine(400, json.dumps({"error": {"message": raw, "param": "body.n", "code": 400}}).encode(), MODEL)
    assert error.message == "n must be at most 16384, got 20000." and error.param == "n"


def test_an_engine_death_does_not_refer_clients_to_the_log() -> None:
    raw = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    assert from_engine(500, json.dumps({"error": {"message": raw}}).encode(), MODEL).message == simplify_message(raw)
    chunk = b'data: {"error": ' + json.dumps({"message": raw, "code": 500}).encode() + b"}\n\n"
    chunk = chunk.replace(b'{"error": ', b'{"error":')
    said = rewrite_errors(chunk, OPENAI, "r", explain_error)
    assert b"stack trace" not in said and b"The engine stopped" in said and said.endswith(b"\n\n")


def test_a_field_is_named_without_the_body() -> None:
    assert [simplify_field(f) for f in ("body.max_tokens", "body", None, "n")] == ["max_tokens", None, None, "n"]


def test_only_the_start_of_a_long_message_is_read() -> None:
    long = "x" * MAX_MESSAGE_CHARS
    assert simplify_message(f"{long} See stack trace") == f"{long} ..."
    advice = "Set the VLLM_A environment variable."
    assert simplify_message(advice + long).startswith("xxx") and advice not in simplify_message(long + advice)
    tools = "requires --tool-call-parser to be set"
    assert explain_refusal(f"{long}{tools}") == f"{long}{tools}" and explain_refusal(tools + long) != tools + long


def test_blanks_in_client_input_are_cut_off() -> None:
    body = json.dumps({"error": {"message": f"bad role {' ' * 2**20}!", "param": "p" * 2**20}}).encode()
    error = from_engine(400, body, MODEL)
    assert len(error.message) <= LONGEST_MESSAGE and len(str(error.param)) <= LONGEST_PARAM
    assert len(explain_error(f"bad role {' ' * 2**20}!", None)) <= MAX_MESSAGE_CHARS + len(" ...")


def test_the_advice_pattern_does_not_begin_with_an_unbounded_repeat() -> None:
    assert not ADVICE_TO_DEPLOYER.pattern.startswith((r"\s*", r"\s+", " *", " +"))


def test_no_more_fields_are_parsed_than_a_message_names(monkeypatch: pytest.MonkeyPatch) -> None:
    item = "'loc': ('{}',), 'msg': 'm'"
    message = "9 validation errors:\n" + "".join(item.format(f"f{number}") for number in range(100))
    read: list[str] = []

    def count(text: str) -> object:
        read.append(text)
        return ast.literal_eval(text)

    monkeypatch.setattr(wording, "ast", SimpleNamespace(literal_eval=count))
    assert simplify_message(message).endswith("f2: m; and more.")
    assert len(read) == 2 * (MAX_FIELDS + 1)


@pytest.mark.parametrize(("error", "logged"), [(ValueError("no"), 0), (RuntimeError("a fault"), 1)])
def test_the_log_has_no_traceback_of_a_refused_request(
    error: Exception, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_refusals()
    quiet_refusals()
    log = logging.getLogger(ANTHROPIC_LOGGER)
    try:
        raise error
    except Exception as raised:
        log.exception("Error in create_messages: %s", raised)
    assert len(caplog.records) == logged and len(log.filters) == 1
