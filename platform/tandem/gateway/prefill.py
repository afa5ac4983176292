"""Has a prompt read by a replica that does nothing else, and tells the replica that generates where to fetch the KV cache."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import aiohttp
from pydantic_core import from_json, to_json

from tandem.gateway.errors import ApiError, NoReplica
from tandem.gateway.latency import Stopwatch
from tandem.gateway.upstream import ATTEMPTS, EngineRequest, Upstream

ROUTES = ("/v1/completions", "/v1/chat/completions")
"""Routes that generate and whose requests can say where a cache lies."""
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
LENGTHS = ("max_tokens", "max_completion_tokens")


async def with_prefill(upstream: Upstream, body: dict[str, Any], call: EngineRequest) -> EngineRequest:
    """The call with `kv_transfer_params`, or as it was where reading its prompt elsewhere does not pay or fails.

    A prefill replica that cannot be had costs time and no answer: the other replica then reads the prompt itself. One that
    broke off counts as one that has begun with the call: no prompt gets to more replicas here than elsewhere.
    """
    config = call.model.base.config.prefill
    if config is None or call.path not in ROUTES or len(call.body) < config.min_bytes or not upstream.has(call.model):
        return call
    asked = {key: value for key, value in body.items() if key not in ("stream_options", "min_tokens", *LENGTHS)}
    asked |= {"stream": False, "n": 1, "kv_transfer_params": ASK}
    asked |= dict.fromkeys([key for key in LENGTHS if key in body] or ["max_tokens"], 1)
    model = replace(call.model, prefill=True)
    routing = replace(call.routing, pool=model.pool)
    first = replace(call, body=to_json(asked), model=model, routing=routing, watch=Stopwatch())
    began, told, broken = time.perf_counter(), None, 0
    async with contextlib.AsyncExitStack() as held:
        try:
            answer, start, _ = await upstream.open(first, held, ATTEMPTS - 1)
            told = from_json(start + await answer.read()).get("kv_transfer_params") if answer.status == 200 else None
        except NoReplica as reason:
            broken = reason.started - (ATTEMPTS - 1)
        except (aiohttp.ClientError, OSError, TimeoutError):
            broken = 1
        except (ApiError, ValueError):
            pass
    # A request that the engine refuses is refused by the other one too, in words that the client then gets.
    more = {"kv_transfer_params": told} if told else {}
    # What reading took is not the gateway's own time.
    watch = Stopwatch(received=call.watch.received + time.perf_counter() - began)
    # A cache is of this version of the model: another must not answer from it.
    pinned = replace(call.routing, pinned=call.routing.pinned or bool(more))
    return replace(call, body=to_json({**body, **more}), routing=pinned, started=broken, watch=watch)
