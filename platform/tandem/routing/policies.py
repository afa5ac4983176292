"""How a replica is chosen: one function for each policy, found by its name in `POLICIES`. Pure but for the dice.

A policy proposes. The router sees to it that what comes of it is ready and not to be avoided, so a policy may return anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tandem.config.serving.app import RouterConfig
from tandem.errors import ConfigError, did_you_mean
from tandem.routing.affinity import PrefixHistory, SessionHistory
from tandem.routing.index import ReplicaIndex
from tandem.routing.request import PREFIX_LENGTHS, RoutingRequest, hash_key

MAX_CANDIDATES = 8
"""Replicas that are weighed for each reason to prefer one; so a decision takes as long with 1,000 replicas as with 10."""
SCAN_ALL_UP_TO = 4
"""A base with so few replicas has all of them weighed."""
HOMES_PER_KEY = 2
"""Replicas that a text or an adapter is at home at."""
NOMINAL_REQUESTS = 8
"""The work of a replica, on average, above which all that speaks for one counts for more, in proportion: where all have much to
do, a few requests are no difference, and what is done twice is what they can afford the least."""
CONSOLIDATION_SHARE = 0.5
"""Share of `adapter_requests` that draws an adapter's requests together at one of its replicas: slots are few."""


@dataclass(slots=True)
class RoutingContext:
    """What a policy sees beside the request."""

    config: RouterConfig
    index: ReplicaIndex
    prefixes: PrefixHistory
    sessions: SessionHistory
    exclude: Collection[str]
    rng: random.Random
    home_requests: float
    """The config's, or 0 where there is one gateway, which knows by itself where it sent what."""


Policy = Callable[[RoutingRequest, RoutingContext], str | None]


def affinity(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The replica that costs least: its work, less what it need not do again for this request.

    All of it is counted in requests. Weighed are those that hold the adapter, have read the beginning of the text, or had the
    session last; where text and adapter are at home; and two at random, which is where the load goes when the others are too busy
    (Mitzenmacher 2001: two choices bear stale loads well, the idlest of all draws every gateway at once).
    """
    config, index = context.config, context.index
    gains: dict[str, float] = {}
    if request.prefix_hashes:
        most, per_request = config.prefix_requests, config.prefix_bytes_per_request
        for replica, depth in context.prefixes.longest_matches(request.prefix_hashes, MAX_CANDIDATES).items():
            gains[replica] = min(most, PREFIX_LENGTHS[depth - 1] / per_request)
    if request.session is not None:
        last = context.sessions.get(request.session)
        if last is not None:
            gains[last] = gains.get(last, 0.0) + config.session_requests
    adapter = request.adapter
    holders = [] if adapter is None else index.holders(adapter, MAX_CANDIDATES)
    for replica in holders:
        gains.setdefault(replica, 0.0)
    if adapter is not None and len(holders) > 1:
        gains[index.ring.rendezvous(hash_key(adapter), holders)] += CONSOLIDATION_SHARE * config.adapter_requests
    if context.home_requests:
        for home, gain in _homes(request, index, holders):
            gains[home] = gains.get(home, 0.0) + gain * context.home_requests
    for replica in index.ready if len(index) <= SCAN_ALL_UP_TO else index.sample(2):
        gains.setdefault(replica, 0.0)
    weight = max(1.0, index.load_buckets.mean() / NOMINAL_REQUESTS)
    best, least = None, 0.0
    for replica, gain in gains.items():
        load = index.load_buckets.get(replica)
        if load is None or replica in context.exclude:
            continue
        if adapter is not None:
            gain += config.adapter_requests * index.adapter_presence(replica, adapter)
        cost = load - weight * gain
        if best is None or cost < least:
            best, least = replica, cost
    return best


def _homes(request: RoutingRequest, index: ReplicaIndex, holders: list[str]) -> list[tuple[str, float]]:
    """Where a request belongs whatever this gateway has seen, and which share of a home that is: gateways agree without a word.

    Of the replicas that hold its adapter one is its session's or its text's; an adapter that nobody holds has a home of its own.
    A text has one, and half a one, where it goes when the first has too much; a session has one.
    """
    key = request.prefix_hashes[0] if request.prefix_hashes else None
    if request.adapter is not None:
        if holders:
            key = request.session or key
            return [] if key is None else [(index.ring.rendezvous(key, holders), 1.0)]
        return [(home, 1.0) for home in index.ring.successors(hash_key(request.adapter), 1)]
    found = (
        [] if key is None else [(home, 1 / n) for n, home in enumerate(index.ring.successors(key, HOMES_PER_KEY), 1)]
    )
    if request.session is not None:
        found += [(home, 1.0) for home in index.ring.successors(request.session, 1)]
    return found


def least_loaded(request: RoutingRequest, context: RoutingContext) -> str | None:
    """One of those with the least work."""
    return context.index.load_buckets.least_loaded(context.rng, context.exclude)


def two_choices(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The idler of two at random."""
    return context.index.least_loaded(context.index.sample(2), context.exclude)


def round_robin(request: RoutingRequest, context: RoutingContext) -> str | None:
    """Each in its turn."""
    return next((replica for replica in context.index.round_robin() if replica not in context.exclude), None)


def prefix_tree(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The rule of Ray Serve LLM's prefix-aware router, for comparison: adapters first, then texts, nothing is weighed.

    While the busiest has at most `imbalance_requests` more than the idlest, a request goes to a replica that has read the most
    of its text, if that is at least `match_rate` of it; else to the idlest. Where any hold the adapter, only they are asked.
    """
    config, index, exclude = context.config, context.index, context.exclude
    holders = index.holders(request.adapter, MAX_CANDIDATES) if request.adapter is not None else []
    if index.load_buckets.spread() <= config.imbalance_requests and request.prefix_hashes:
        found = context.prefixes.longest_matches(request.prefix_hashes, MAX_CANDIDATES)
        if holders:
            found = {replica: depth for replica, depth in found.items() if replica in holders}
        deepest = max(found.values(), default=0)
        if deepest and PREFIX_LENGTHS[deepest - 1] >= config.match_rate * request.size:
            return index.least_loaded((replica for replica, depth in found.items() if depth == deepest), exclude)
    if holders:
        return index.least_loaded(holders, exclude)
    return index.load_buckets.least_loaded(context.rng, exclude)


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
