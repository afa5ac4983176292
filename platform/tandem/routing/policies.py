"""Routing policies: one function each, by name in `POLICIES`. Pure except for the random generator in the context.

A policy proposes a replica id. The router replaces proposals that are not ready or excluded, so a policy may return anything.
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
"""Candidates for each reason to prefer a replica; a decision takes as long with 1,000 replicas as with 10."""
SCAN_ALL_UP_TO = 4
"""Pools of at most so many replicas have all of them as candidates."""
HOMES_PER_KEY = 2
"""Replicas on the hash ring that a text prefers."""
NOMINAL_REQUESTS = 8
"""Mean load above which preferences count more, in proportion: under high load a few requests of difference matter less, and
repeated work (prefill, adapter loads) matters more."""
CONSOLIDATION_SHARE = 0.5
"""Share of `adapter_requests` that an adapter's requests prefer one of its replicas by: adapter slots are few."""


@dataclass(slots=True)
class RoutingContext:
    """Input of a policy beside the request."""

    config: RouterConfig
    index: ReplicaIndex
    prefixes: PrefixHistory
    sessions: SessionHistory
    exclude: Collection[str]
    rng: random.Random
    home_requests: float
    """`router.home_requests`; 0 with a single gateway, whose own histories are complete."""


Policy = Callable[[RoutingRequest, RoutingContext], str | None]


def affinity(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The replica with the lowest cost: its load, minus the work that it saves for this request, both in requests.

    Candidates are the replicas that hold the adapter, have read the text's prefix or had the session's last request, those that
    text and adapter hash to, and two random ones, which take the load when the others are too busy (Mitzenmacher 2001: two random
    choices tolerate stale loads, while the globally least loaded replica would attract every gateway at once).
    """
    config, index = context.config, context.index
    gains: dict[str, float] = {}
    if request.prefix_hashes:
        max_gain, bytes_per_request = config.prefix_requests, config.prefix_bytes_per_request
        for replica, depth in context.prefixes.longest_matches(request.prefix_hashes, MAX_CANDIDATES).items():
            gains[replica] = min(max_gain, PREFIX_LENGTHS[depth - 1] / bytes_per_request)
    if request.session is not None:
        last_replica = context.sessions.get(request.session)
        if last_replica is not None:
            gains[last_replica] = gains.get(last_replica, 0.0) + config.session_requests
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
    best, lowest_cost = None, 0.0
    for replica, gain in gains.items():
        load = index.load_buckets.get(replica)
        if load is None or replica in context.exclude:
            continue
        if adapter is not None:
            gain += config.adapter_requests * index.adapter_presence(replica, adapter)
        cost = load - weight * gain
        if best is None or cost < lowest_cost:
            best, lowest_cost = replica, cost
    return best


def _homes(request: RoutingRequest, index: ReplicaIndex, holders: list[str]) -> list[tuple[str, float]]:
    """Replicas that a request hashes to, with weights: the same at every gateway, whatever it has seen.

    Among the holders of the adapter, the session or the text selects one. An adapter without holders has one replica, a session
    one, a text two: the second, with half the weight, takes the spill-over of the first.
    """
    key = request.prefix_hashes[0] if request.prefix_hashes else None
    if request.adapter is not None:
        if holders:
            key = request.session or key
            return [] if key is None else [(index.ring.rendezvous(key, holders), 1.0)]
        return [(home, 1.0) for home in index.ring.successors(hash_key(request.adapter), 1)]
    homes = (
        []
        if key is None
        else [(home, 1 / rank) for rank, home in enumerate(index.ring.successors(key, HOMES_PER_KEY), 1)]
    )
    if request.session is not None:
        homes += [(home, 1.0) for home in index.ring.successors(request.session, 1)]
    return homes


def least_loaded(request: RoutingRequest, context: RoutingContext) -> str | None:
    """A random one of the least loaded replicas."""
    return context.index.load_buckets.least_loaded(context.rng, context.exclude)


def two_choices(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The less loaded of two random replicas."""
    return context.index.least_loaded(context.index.sample(2), context.exclude)


def round_robin(request: RoutingRequest, context: RoutingContext) -> str | None:
    """Every replica in turn."""
    return next((replica for replica in context.index.round_robin() if replica not in context.exclude), None)


def prefix_tree(request: RoutingRequest, context: RoutingContext) -> str | None:
    """The rule of Ray Serve LLM's prefix-aware router, for comparison: adapters first, then text prefixes, no weights.

    While the loads differ by at most `imbalance_requests`, a request goes to the replica with the longest matching prefix, if
    that is at least the share `match_rate` of the text; otherwise to the least loaded. Replicas that hold the adapter come first.
    """
    config, index, exclude = context.config, context.index, context.exclude
    holders = index.holders(request.adapter, MAX_CANDIDATES) if request.adapter is not None else []
    if index.load_buckets.spread() <= config.imbalance_requests and request.prefix_hashes:
        matches = context.prefixes.longest_matches(request.prefix_hashes, MAX_CANDIDATES)
        if holders:
            matches = {replica: depth for replica, depth in matches.items() if replica in holders}
        deepest = max(matches.values(), default=0)
        if deepest and PREFIX_LENGTHS[deepest - 1] >= config.match_rate * request.size:
            return index.least_loaded((replica for replica, depth in matches.items() if depth == deepest), exclude)
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
"""Policies by their names in `router.policy`."""


def find_policy(name: str) -> Policy:
    """The policy of that name; ConfigError with the nearest if there is none."""
    if name not in POLICIES:
        raise ConfigError(
            f"router.policy is {name!r}; it must be one of {', '.join(POLICIES)}.{did_you_mean(name, POLICIES)}"
        )
    return POLICIES[name]
