"""Disaggregated prefill: a prefill replica reads the prompt, and the decode replica fetches its KV cache.

The prefill replica is asked for one token. Its answer says where the KV cache lies (`kv_transfer_params`), and that goes along
with the request to the replica that generates.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

from pydantic_core import from_json, to_json

from tandem.gateway.errors import ApiError
from tandem.gateway.latency import Stopwatch
from tandem.gateway.relay import Relay
from tandem.gateway.replicas.engine_http import EngineHttpError
from tandem.gateway.replicas.upstream import EngineRequest
from tandem.gateway.retry_budget import MAX_STARTED_REPLICAS, RetryBudget

ROUTES = ("/v1/completions", "/v1/chat/completions")
"""Routes that generate and whose requests can carry `kv_transfer_params`."""
TRANSFER_REQUEST = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""Value of `kv_transfer_params` that asks a prefill replica to keep the cache for another engine."""
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")


async def with_prefill(relay: Relay, request: EngineRequest, budget: RetryBudget) -> EngineRequest:
    """The request with `kv_transfer_params`; unchanged where prefill elsewhere does not pay or fails.

    A failed prefill costs time only: the decode replica then reads the prompt itself. A prefill replica that broke off counts
    in `budget` as one that has begun with the request. The body is read from its bytes where it is needed, and not kept: as
    Python's objects it takes about ten times as much as the gateway's byte budget has counted.
    """
    config = request.model.base.config.prefill
    if config is None or request.path not in ROUTES or len(request.body) < config.min_bytes:
        return request
    prefill = _prefill_request(request)
    # A KV cache serves only replicas of its own version: without a decode replica of it, another version answers, unaided.
    if not all(relay.fleet.has_pool(pool) for pool in (prefill.routing.pool, request.routing.pool)):
        return request
    # One replica only may begin with it: no prompt reaches more replicas than MAX_STARTED_REPLICAS in all.
    prefill_budget = RetryBudget(started_replicas=MAX_STARTED_REPLICAS - 1)
    started_at, transfer = time.perf_counter(), None
    with contextlib.ExitStack() as resources:
        try:
            attempt = await relay.first_answer(prefill, prefill_budget, resources, _raise)
            if attempt.response is not None and attempt.response.status == 200:
                result = from_json(attempt.first_chunk + await attempt.response.read())
                transfer = result.get("kv_transfer_params")
        except EngineHttpError:
            prefill_budget.started_replicas += 1
        except (ApiError, ValueError):
            # A request that the engine refuses is refused by the decode replica too, with a message for the client.
            pass
    budget.started_replicas += prefill_budget.started_replicas - (MAX_STARTED_REPLICAS - 1)
    budget.reached_engine |= prefill_budget.reached_engine
    # Time of the prefill is not counted as the gateway's own.
    request.stopwatch.received += time.perf_counter() - started_at
    if not transfer:
        return request
    # A KV cache belongs to one version of the model: another version must not answer from it.
    return replace(
        request,
        body=to_json({**from_json(request.body), "kv_transfer_params": transfer}),
        routing=replace(request.routing, pinned=True),
    )


def _prefill_request(request: EngineRequest) -> EngineRequest:
    """The request for the prefill replica: the same prompt, one token, no stream."""
    body: dict[str, Any] = from_json(request.body)
    values = {
        key: value for key, value in body.items() if key not in ("stream_options", "min_tokens", *MAX_TOKENS_FIELDS)
    }
    values |= {"stream": False, "n": 1, "kv_transfer_params": TRANSFER_REQUEST}
    values |= dict.fromkeys([key for key in MAX_TOKENS_FIELDS if key in body] or ["max_tokens"], 1)
    model = replace(request.model, prefill=True)
    return replace(
        request,
        body=to_json(values),
        model=model,
        routing=replace(request.routing, pool=model.pool),
        # The decode replica counts the prompt's tokens.
        labels=None,
        stopwatch=Stopwatch(),
    )


async def _raise(error: ApiError) -> None:
    raise error
