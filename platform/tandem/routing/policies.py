"""How a replica is chosen: one function for each policy, found by its name in `POLICIES`. Pure but for the dice.

A policy proposes. The router sees to it that what comes of it is ready and not to be avoided, so a policy may return anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tandem.config.serving.app import RouterConfig
from tandem.errors import ConfigError, did_you_mean
from tandem.routing.affinity import PrefixMemory, SessionMemory
from tandem.routing.index import Pool
from tandem.routing.request import BOUNDS, Ask, key_of

LOOKED_AT = 8
"""Replicas that are weighed for each reason to prefer one; so a decision takes as long with 1,000 replicas as with 10."""
FEW = 4
"""A base with so few replicas has all of them weighed."""
HOMES = 2
"""Replicas that a text or an adapter is at home at."""
USUAL_REQUESTS = 8
"""The work of a replica, on average, above which all that speaks for one counts for more, in proportion: where all have much to
do, a few requests are no difference, and what is done twice is what they can afford the least."""
GATHERED = 0.5
"""Share of `adapter_requests` that draws an adapter's requests together at one of its replicas: slots are few."""


@dataclass(slots=True)
class Sight:
    """What a policy sees beside the request."""

    config: RouterConfig
    pool: Pool
    prefixes: PrefixMemory
    sessions: SessionMemory
    avoid: Collection[str]
    dice: random.Random
    home_requests: float
    """The config's, or 0 where there is one gateway, which knows by itself where it sent what."""


Policy = Callable[[Ask, Sight], str | None]


def affinity(ask: Ask, sight: Sight) -> str | None:
    """The replica that costs least: its work, less what it need not do again for this request.

    All of it is counted in requests. Weighed are those that hold the adapter, have read the beginning of the text, or had the
    session last; where text and adapter are at home; and two at random, which is where the load goes when the others are too busy
    (Mitzenmacher 2001: two choices bear stale loads well, the idlest of all draws every gateway at once).
    """
    config, pool = sight.config, sight.pool
    gains: dict[str, float] = {}
    if ask.blocks:
        most, per_request = config.prefix_requests, config.prefix_bytes_per_request
        for replica, depth in sight.prefixes.longest(ask.blocks, LOOKED_AT).items():
            gains[replica] = min(most, BOUNDS[depth - 1] / per_request)
    if ask.session is not None:
        last = sight.sessions.get(ask.session)
        if last is not None:
            gains[last] = gains.get(last, 0.0) + config.session_requests
    adapter = ask.adapter
    holders = [] if adapter is None else pool.holders(adapter, LOOKED_AT)
    for replica in holders:
        gains.setdefault(replica, 0.0)
    if adapter is not None and len(holders) > 1:
        gains[pool.ring.favourite(key_of(adapter), holders)] += GATHERED * config.adapter_requests
    if sight.home_requests:
        for home, gain in _homes(ask, pool, holders):
            gains[home] = gains.get(home, 0.0) + gain * sight.home_requests
    for replica in pool.ready if len(pool) <= FEW else pool.some(2):
        gains.setdefault(replica, 0.0)
    weight = max(1.0, pool.levels.mean() / USUAL_REQUESTS)
    best, least = None, 0.0
    for replica, gain in gains.items():
        work = pool.levels.get(replica)
        if work is None or replica in sight.avoid:
            continue
        if adapter is not None:
            gain += config.adapter_requests * pool.held(replica, adapter)
        cost = work - weight * gain
        if best is None or cost < least:
            best, least = replica, cost
    return best


def _homes(ask: Ask, pool: Pool, holders: list[str]) -> list[tuple[str, float]]:
    """Where a request belongs whatever this gateway has seen, and which share of a home that is: gateways agree without a word.

    Of the replicas that hold its adapter one is its session's or its text's; an adapter that nobody holds has a home of its own.
    A text has one, and half a one, where it goes when the first has too much; a session has one.
    """
    key = ask.blocks[0] if ask.blocks else None
    if ask.adapter is not None:
        if holders:
            key = ask.session or key
            return [] if key is None else [(pool.ring.favourite(key, holders), 1.0)]
        return [(home, 1.0) for home in pool.ring.homes(key_of(ask.adapter), 1)]
    found = [] if key is None else [(home, 1 / n) for n, home in enumerate(pool.ring.homes(key, HOMES), 1)]
    if ask.session is not None:
        found += [(home, 1.0) for home in pool.ring.homes(ask.session, 1)]
    return found


def least_loaded(ask: Ask, sight: Sight) -> str | None:
    """One of those with the least work."""
    return sight.pool.levels.idlest(sight.dice, sight.avoid)


def two_choices(ask: Ask, sight: Sight) -> str | None:
    """The idler of two at random."""
    return sight.pool.least(sight.pool.some(2), sight.avoid)


def round_robin(ask: Ask, sight: Sight) -> str | None:
    """Each in its turn."""
    return next((replica for replica in sight.pool.in_turn() if replica not in sight.avoid), None)


def prefix_tree(ask: Ask, sight: Sight) -> str | None:
    """The rule of Ray Serve LLM's prefix-aware router, for comparison: adapters first, then texts, nothing is weighed.

    While the busiest has at most `imbalance_requests` more than the idlest, a request goes to a replica that has read the most
    of its text, if that is at least `match_rate` of it; else to the idlest. Where any hold the adapter, only they are asked.
    """
    config, pool, avoid = sight.config, sight.pool, sight.avoid
    holders = pool.holders(ask.adapter, LOOKED_AT) if ask.adapter is not None else []
    if pool.levels.spread() <= config.imbalance_requests and ask.blocks:
        found = sight.prefixes.longest(ask.blocks, LOOKED_AT)
        if holders:
            found = {replica: depth for replica, depth in found.items() if replica in holders}
        deepest = max(found.values(), default=0)
        if deepest and BOUNDS[deepest - 1] >= config.match_rate * ask.size:
            return pool.least((replica for replica, depth in found.items() if depth == deepest), avoid)
    if holders:
        return pool.least(holders, avoid)
    return pool.levels.idlest(sight.dice, avoid)


POLICIES: dict[str, Policy] = {
    "affinity": affinity,
    "least_loaded": least_loaded,
    "two_choices": two_choices,
    "round_robin": round_robin,
    "prefix_tree": prefix_tree,
}
"""By the names that `router.policy` may have."""


def find_policy(name: str) -> Policy:
    """The policy of that name; ConfigError with the nearest if there is none."""
    if name not in POLICIES:
        raise ConfigError(
            f"router.policy is {name!r}; it must be one of {', '.join(POLICIES)}.{did_you_mean(name, POLICIES)}"
        )
    return POLICIES[name]
