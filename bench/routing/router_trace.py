"""The traffic of bench/routing/router_sim.py: made up from stated distributions, or read from a file.

Made up (lengths in tokens): sessions begin by a Poisson process, or in bursts (waves of `BURST_S` seconds, three times as dense
as what is between them). A session belongs to an adapter (with `adapter_share`), drawn by Zipf's law with exponent 1, or else to
one of `TENANTS` applications of the base, drawn likewise. Adapter and application have a system prompt of their own that all
their sessions share: 64 x 2^(0..6), the middle the most frequent. A session has a geometric number of turns (mean 3), `THINK_S`
apart (exponential); a turn adds 64 to 512 tokens, and its answer (exponential, mean 180, 8 to 1,000) is in the next prompt.

A file has one JSON object a line: {"at_s", "prompt_tokens", "output_tokens", "blocks", and if wanted "adapter", "session"}, where
`blocks` are ids of the prompt's blocks of 64 tokens, each standing for all of the prompt up to its end (so equal ids are equal
beginnings). Mooncake's published traces are read as well: {"timestamp" in ms, "input_length", "output_length", "hash_ids"}, with
512 tokens a hash.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tandem.routing.request import hash_key

BLOCK = 64
"""Tokens of a block."""
TENANTS = 2_000
BURST_S = 10.0
THINK_S = 10.0
MEAN_TURNS = 3


@dataclass(slots=True)
class Call:
    """One request."""

    at: float
    """Seconds from the beginning."""
    adapter: str | None
    session: int | None
    blocks: list[int]
    """Of the session so far and later; the first `count` are this prompt's."""
    count: int
    output: int
    """Tokens of the answer."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Parameters of synthetic traffic."""

    rate: float
    """Requests a second, on average."""
    seconds: float
    adapters: int
    adapter_share: float = 0.5
    bursty: bool = False
    seed: int = 0


def made_up(shape: Shape) -> list[Call]:
    """The calls in the order of time."""
    dice = random.Random(shape.seed)
    tenants = list(accumulate(1 / rank for rank in range(1, TENANTS + 1)))
    adapters = list(accumulate(1 / rank for rank in range(1, shape.adapters + 1)))
    prompts: dict[str, list[int]] = {}
    calls: list[Call] = []
    for at in _beginnings(shape, dice):
        if dice.random() < shape.adapter_share:
            owner = f"adapter-{_draw(adapters, dice)}@1"
            adapter: str | None = owner
        else:
            owner, adapter = f"tenant-{_draw(tenants, dice)}", None
        system = prompts.get(owner)
        if system is None:
            length = 2 ** sum(dice.random() < 0.5 for _ in range(6))
            system = prompts[owner] = [dice.getrandbits(64) for _ in range(length)]
        blocks, session = list(system), dice.getrandbits(64)
        while True:
            blocks += [dice.getrandbits(64) for _ in range(dice.randint(1, 8))]
            output = int(min(1000, max(8, dice.expovariate(1 / 180))))
            if 0 <= at < shape.seconds:
                calls.append(Call(at, adapter, session, blocks, len(blocks), output))
            if at >= shape.seconds or dice.random() < 1 / MEAN_TURNS:
                break
            blocks += [dice.getrandbits(64) for _ in range(output // BLOCK)]
            at += dice.expovariate(1 / THINK_S)
    calls.sort(key=lambda call: call.at)
    return calls


def _beginnings(shape: Shape, dice: random.Random) -> Iterator[float]:
    # Sessions that began earlier still talk: the first turns come before the trace, so that it is at full rate from its start.
    at, sessions_per_s = -3 * THINK_S, shape.rate / MEAN_TURNS
    while at < shape.seconds:
        dense = 1.5 if int(at // BURST_S) % 2 else 0.5
        at += dice.expovariate(sessions_per_s * (dense if shape.bursty else 1.0))
        yield at


def _draw(cumulative: list[float], dice: random.Random) -> int:
    return dice.choices(range(len(cumulative)), cum_weights=cumulative)[0]


def recorded(path: Path) -> list[Call]:
    """The calls of a file, in the order of time."""
    calls = []
    with path.open() as lines:
        for line in lines:
            record = json.loads(line)
            if "hash_ids" in record:
                blocks = [(number << 3) + part for number in record["hash_ids"] for part in range(512 // BLOCK)]
                count = min(len(blocks), max(1, record["input_length"] // BLOCK))
                calls.append(
                    Call(record["timestamp"] / 1000, None, None, _mixed(blocks), count, record["output_length"])
                )
            else:
                blocks = _mixed(record["blocks"])
                session = record.get("session")
                session = None if session is None else hash_key(str(session))
                calls.append(
                    Call(record["at_s"], record.get("adapter"), session, blocks, len(blocks), record["output_tokens"])
                )
    calls.sort(key=lambda call: call.at)
    return calls


def _mixed(numbers: list[int]) -> list[int]:
    """Ids spread over 64 bits, as hashes are."""
    return [(number + 1) * 0x9E3779B97F4A7C15 % 2**64 for number in numbers]


def write(calls: list[Call], path: Path) -> None:
    """Record calls."""
    with path.open("w") as file:
        for call in calls:
            record: dict[str, object] = {
                "at_s": round(call.at, 4),
                "prompt_tokens": call.count * BLOCK,
                "output_tokens": call.output,
            }
            record |= {"adapter": call.adapter, "session": call.session, "blocks": call.blocks[: call.count]}
            file.write(json.dumps(record) + "\n")
