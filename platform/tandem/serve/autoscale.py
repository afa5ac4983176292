"""Chooses how many replicas a model has, by what its engines say of themselves. `decide` is pure: callers pass the clock.

`EnginePolicy` hands it to Ray Serve, whose controller unpickles this module by value: it imports the standard library only,
so that a controller needs nothing of ours installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tandem.config.serving.autoscaling import AutoscalingConfig

DOWNSCALE_BELOW = 0.7
"""Fewer replicas are enough if each stays below this share of its targets; more are needed above the whole of them."""
MAX_AGE_S = 10.0
"""What a replica said longer ago is not known any more."""
TTFT_SETTLING_S = 10.0
"""How long after a change of replicas a slow first token says nothing: it was slow before. As long as engines remember."""


@dataclass(frozen=True)
class ReplicaSignals:
    """One ready replica, as it last described itself."""

    waiting: float = 0.0
    running: float = 0.0
    kv_usage: float = 0.0
    ttft_s: float = 0.0
    """What 9 of 10 of the last seconds' first tokens took; 0: there were none."""
    max_running: float = 0.0
    """Requests that its engine works on at once, at most; 0: not known."""


@dataclass(frozen=True)
class Signals:
    """A model at one moment."""

    replicas: tuple[ReplicaSignals, ...] = ()
    """Those that are ready and have spoken."""
    ready: int = 0
    """How many are ready."""
    target: int = 0
    """How many there are to be, by the last decision."""
    held: float = 0.0
    """Requests that gateways keep for want of a replica."""


@dataclass(frozen=True)
class State:
    """What a decision remembers for the next."""

    up_since: float | None = None
    """Since when there has been reason for more replicas."""
    down_since: float | None = None
    down_to: int = 0
    """The most that were needed since then."""
    ready: int = 0
    changed_at: float = -math.inf
    """When the number of ready replicas last changed."""
    capacity: float = 0.0
    """Requests that a replica was last seen to work on while others waited; 0: never seen."""


def decide(signals: Signals, config: AutoscalingConfig, now: float, state: State) -> tuple[int, State]:
    """How many replicas there should be, within the config's bounds, and what to remember; `now` in seconds."""
    if signals.ready != state.ready:
        state = replace(state, ready=signals.ready, changed_at=now)
    state = replace(state, capacity=_capacity(signals) or state.capacity)
    target = _clamp(signals.target, config)
    more = _clamp(_required_replicas(signals, config, state, settled=now - state.changed_at >= TTFT_SETTLING_S), config)
    if more > target:
        since = now if state.up_since is None else state.up_since
        # A model without replicas answers nobody: there is nothing to wait for.
        if target and now - since < config.upscale_delay_s:
            return target, replace(state, up_since=since, down_since=None)
        return more, replace(state, up_since=None, down_since=None)
    state = replace(state, up_since=None)
    fewer = max(more, _clamp(_sufficient_replicas(signals, config, state, target), config))
    if fewer >= target:
        return target, replace(state, down_since=None)
    since = now if state.down_since is None else state.down_since
    fewer = fewer if state.down_since is None else max(fewer, state.down_to)
    delay_s = config.downscale_delay_s
    # The last replica has a delay of its own: the others go first.
    if fewer == 0 and target > 1:
        fewer = 1
    elif fewer == 0 and config.downscale_to_zero_delay_s is not None:
        delay_s = config.downscale_to_zero_delay_s
    if now - since < delay_s:
        return target, replace(state, down_since=since, down_to=fewer)
    return fewer, replace(state, down_since=None)


def _required_replicas(signals: Signals, config: AutoscalingConfig, state: State, *, settled: bool) -> int:
    """Replicas that the load asks for, whatever the bounds."""
    ready, backlog = signals.ready, signals.held + sum(each.waiting for each in signals.replicas)
    if not ready:
        return max(signals.target, 1 if backlog else 0)
    needs = [math.ceil(_total(signals, "kv_usage") / config.target_kv_usage)]
    if backlog > ready * config.target_waiting:
        # One more works on what one of these does, and as much may wait for it as for them.
        each = max(state.capacity, 1.0) + config.target_waiting
        needs.append(ready + math.ceil((backlog - ready * config.target_waiting) / each))
    if config.target_running is not None:
        needs.append(math.ceil(_total(signals, "running") / config.target_running))
    slow = config.target_ttft_s is not None and _ttft_s(signals) > config.target_ttft_s
    if slow and settled and signals.target <= ready:
        needs.append(ready + 1)
    return max(needs)


def _sufficient_replicas(signals: Signals, config: AutoscalingConfig, state: State, target: int) -> int:
    """The fewest replicas that would do with ease; `target` while that cannot be told."""
    backlog = signals.held + sum(each.waiting for each in signals.replicas)
    # With replicas that stop or have not spoken yet, what the others say is not the whole load.
    if backlog or signals.ready > target or len(signals.replicas) < signals.ready:
        return target
    if config.target_ttft_s is not None and _ttft_s(signals) > DOWNSCALE_BELOW * config.target_ttft_s:
        return target
    running = _total(signals, "running")
    if not running:
        return 0
    most = [each.max_running for each in signals.replicas if each.max_running]
    known = [config.target_running or 0.0, state.capacity, min(most, default=0.0)]
    at_once = min((each for each in known if each), default=0.0)
    kv = math.ceil(_total(signals, "kv_usage") / (DOWNSCALE_BELOW * config.target_kv_usage))
    return max(1, kv, math.ceil(running / (DOWNSCALE_BELOW * at_once)) if at_once else target)


def _capacity(signals: Signals) -> float:
    """Requests that a replica works on at most, where that shows: in one that keeps others waiting."""
    full = [each.running for each in signals.replicas if each.waiting and each.running]
    return sum(full) / len(full) if full else 0.0


def _ttft_s(signals: Signals) -> float:
    return max((each.ttft_s for each in signals.replicas), default=0.0)


def _total(signals: Signals, name: str) -> float:
    """The sum over all ready replicas; those that have not spoken are taken for like the others."""
    known = [getattr(each, name) for each in signals.replicas]
    return sum(known) * (max(signals.ready, len(known)) / len(known)) if known else 0.0


def _clamp(replicas: int, config: AutoscalingConfig) -> int:
    return max(config.min_replicas, min(config.max_replicas, replicas))


class EnginePolicy:
    """What Serve's controller calls ten times a second; made once for each deployment, with the config's values."""

    def __init__(self, **config: Any) -> None:
        self._config = cast("AutoscalingConfig", SimpleNamespace(**config))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas that `decide` wants, for an `AutoscalingContext` with what replicas gave `record_autoscaling_stats`."""
        now = context.current_time or time.time()
        known = State.__dataclass_fields__
        state = State(**{key: value for key, value in context.policy_state.items() if key in known})
        replicas, state = decide(read(context, now), self._config, now, state)
        return replicas, asdict(state)


def read(context: Any, now: float) -> Signals:
    """The signals in Serve's context: of each replica the newest, of the gateways the most that any replica was told."""
    newest: dict[Any, dict[str, float]] = {}
    for name, of_replicas in (context.raw_metrics or {}).items():
        for replica_id, series in of_replicas.items():
            if series and now - series[-1].timestamp <= MAX_AGE_S:
                newest.setdefault(replica_id, {})[name] = series[-1].value
    spoken = [values for values in newest.values() if "waiting" in values]
    held = max((values.get("held", 0.0) for values in spoken), default=0.0)
    if not context.current_num_replicas:
        # Nobody is there to be told: then it is the calls that wait in Serve's own handles.
        held = float(context.total_num_requests or 0.0)
    return Signals(
        replicas=tuple(_replica(values) for values in spoken),
        ready=context.current_num_replicas,
        target=context.target_num_replicas,
        held=held,
    )


def _replica(values: Mapping[str, float]) -> ReplicaSignals:
    return ReplicaSignals(**{key: values[key] for key in ReplicaSignals.__dataclass_fields__ if key in values})
