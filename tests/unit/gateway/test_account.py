"""The account of one request: what it reserves and what it is charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.auth import Limits
from tandem.auth.principal import Principal, Role
from tandem.db.database import open_database
from tandem.engine.routes import ENGINE_ROUTES
from tandem.engine.usage import TokenCounts
from tandem.gateway.accounting.account import ANSWER_TOKENS, Accounting, RequestAccount, expected_tokens
from tandem.gateway.accounting.limiter import Limiter
from tandem.usage import UsageLabels, UsageStore, UsageWriter

LABELS = UsageLabels("key_1", "lab", "base@1", "", "/v1/completions")
EVENT = b'data: {"choices": []}\n\n'
PRINCIPAL = Principal(key_id="key_1", tenant="lab", role=Role.USER, limits=Limits(tokens_per_minute=10_000))


@pytest.fixture
def accounting(tmp_path: Path) -> Accounting:
    url = f"sqlite:///{tmp_path}/tandem.db"
    open_database(url, create=True).dispose()
    return Accounting(Limiter("g"), UsageWriter(UsageStore(url)), lambda tenant: Limits())


async def opened(accounting: Accounting) -> RequestAccount:
    account = accounting.open(PRINCIPAL, LABELS, TokenCounts(10, ANSWER_TOKENS))
    await account.acquire()
    return account


async def used(accounting: Accounting) -> int:
    """Tokens that count in this minute."""
    account = accounting.open(PRINCIPAL, LABELS, TokenCounts(0, 0))
    await account.acquire()
    return 10_000 - int(account.headers["x-ratelimit-remaining-tokens"])


async def test_a_stream_that_is_left_is_charged_its_reservation_or_what_has_arrived(accounting: Accounting):
    long, short = await opened(accounting), await opened(accounting)
    for _ in range(1000):
        long.read_chunk(EVENT)
    short.read_chunk(EVENT)
    long.close(reached_engine=True)
    assert await used(accounting) == 10 + 1000 + 10 + ANSWER_TOKENS
    short.close(reached_engine=True)
    assert await used(accounting) == 10 + 1000 + 10 + ANSWER_TOKENS


async def test_a_request_that_reached_no_engine_is_charged_no_tokens(accounting: Accounting):
    account = await opened(accounting)
    account.close(reached_engine=False)
    assert await used(accounting) == 0


async def test_a_request_whose_engine_has_counted_is_charged_that(accounting: Accounting):
    account = await opened(accounting)
    assert account.read_chunk(EVENT + b": 10 3 tandem-usage\n\n") == EVENT
    account.close(reached_engine=True)
    assert await used(accounting) == 13


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v1/completions", {}, ANSWER_TOKENS),
        ("/v1/completions", {"max_tokens": 1000}, 1000),
        ("/v1/completions", {"max_tokens": "1000"}, 1000),
        ("/v1/completions", {"max_tokens": "1e3"}, 1000),
        ("/v1/completions", {"max_tokens": 100_000}, 4096),
        ("/v1/completions", {"max_completion_tokens": -1}, ANSWER_TOKENS),
        ("/v1/completions", {"max_completion_tokens": 1, "max_tokens": 1000}, 1000),
        ("/v1/completions", {"min_tokens": 2000}, 2000),
        ("/v1/chat/completions", {"max_completion_tokens": 5, "max_tokens": 1000}, 5),
        ("/v1/chat/completions", {"max_tokens": "1000"}, 1000),
        ("/v1/responses", {"max_output_tokens": 1000, "max_tokens": 1}, 1000),
        ("/v1/messages", {"max_tokens": 1000, "max_output_tokens": 1}, 1000),
        ("/v1/embeddings", {"max_tokens": 1000}, 0),
        ("/v1/messages/count_tokens", {"max_tokens": 1000}, 0),
    ],
)
def test_an_answer_reserves_the_length_that_its_route_reads(path: str, body: dict[str, Any], answer: int):
    (route,) = (each for each in ENGINE_ROUTES if each.path == path)
    assert expected_tokens(route, body, 400, 1, 4096) == (100, answer)
    assert expected_tokens(route, body, 400, 3, 4096) == (100, 3 * answer)
