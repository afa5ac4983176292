"""Autoscaling policy: number of replicas of a model, from its engines' load. `decide` is pure: callers pass the clock.

`EnginePolicy` runs it in Ray Serve's controller, which unpickles this module by value: it imports the standard library only, so
that a controller does not need this package.
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
"""Share of the targets below which the remaining replicas must stay when one is removed."""
MAX_AGE_S = 10.0
"""Age, in seconds, at which signals of a replica expire."""
TTFT_SETTLING_S = 10.0
"""Seconds after a change of the number of replicas in which times to first token are ignored: engines report the last 10 s."""


@dataclass(frozen=True)
class ReplicaSignals:
    """Load of one ready replica."""

    waiting: float = 0.0
    running: float = 0.0
    kv_usage: float = 0.0
    ttft_s: float = 0.0
    """90th percentile of the time to first token over the last seconds; 0: no first tokens."""
    max_running: float = 0.0
    """Largest number of requests that its engine runs at once; 0: not known."""


@dataclass(frozen=True)
class Signals:
    """Load of a model at one moment."""

    replicas: tuple[ReplicaSignals, ...] = ()
    """Ready replicas that have reported."""
    ready: int = 0
    """Number of ready replicas."""
    target: int = 0
    """Number of replicas of the last decision."""
    held: float = 0.0
    """Requests held by gateways because no replica is ready."""


@dataclass(frozen=True)
class State:
    """State between two decisions."""

    up_since: float | None = None
    """Time since which more replicas have been required."""
    down_since: float | None = None
    down_to: int = 0
    """Largest number required since `down_since`."""
    ready: int = 0
    changed_at: float = -math.inf
    """Time of the last change of the number of ready replicas."""
    capacity: float = 0.0
    """Running requests of a replica while others waited, as last observed; 0: never observed."""


def decide(signals: Signals, config: AutoscalingConfig, now: float, state: State) -> tuple[int, State]:
    """The number of replicas, within the config's bounds, and the state for the next decision; `now` in seconds."""
    if signals.ready != state.ready:
        state = replace(state, ready=signals.ready, changed_at=now)
    state = replace(state, capacity=_capacity(signals) or state.capacity)
    target = _clamp(signals.target, config)
    required = _clamp(
        _required_replicas(signals, config, state, settled=now - state.changed_at >= TTFT_SETTLING_S), config
    )
    if required > target:
        since = now if state.up_since is None else state.up_since
        # A model without replicas answers no request: no delay.
        if target and now - since < config.upscale_delay_s:
            return target, replace(state, up_since=since, down_since=None)
        return required, replace(state, up_since=None, down_since=None)
    state = replace(state, up_since=None)
    sufficient = max(required, _clamp(_sufficient_replicas(signals, config, state, target), config))
    if sufficient >= target:
        return target, replace(state, down_since=None)
    since = now if state.down_since is None else state.down_since
    sufficient = sufficient if state.down_since is None else max(sufficient, state.down_to)
    delay_s = config.downscale_delay_s
    # The last replica has a delay of its own: the others go first.
    if sufficient == 0 and target > 1:
        sufficient = 1
    elif sufficient == 0 and config.downscale_to_zero_delay_s is not None:
        delay_s = config.downscale_to_zero_delay_s
    if now - since < delay_s:
        return target, replace(state, down_since=since, down_to=sufficient)
    return sufficient, replace(state, down_since=None)


def _required_replicas(signals: Signals, config: AutoscalingConfig, state: State, *, settled: bool) -> int:
    """Replicas that the load requires, without the bounds."""
    ready, backlog = signals.ready, signals.held + sum(per_replica.waiting for per_replica in signals.replicas)
    if not ready:
        return max(signals.target, 1 if backlog else 0)
    requirements = [math.ceil(_total(signals, "kv_usage") / config.target_kv_usage)]
    if backlog > ready * config.target_waiting:
        # A new replica runs as many requests as one of these, and as many may wait for it.
        per_replica = max(state.capacity, 1.0) + config.target_waiting
        requirements.append(ready + math.ceil((backlog - ready * config.target_waiting) / per_replica))
    if config.target_running is not None:
        requirements.append(math.ceil(_total(signals, "running") / config.target_running))
    is_slow = config.target_ttft_s is not None and _ttft_s(signals) > config.target_ttft_s
    if is_slow and settled and signals.target <= ready:
        requirements.append(ready + 1)
    return max(requirements)


def _sufficient_replicas(signals: Signals, config: AutoscalingConfig, state: State, target: int) -> int:
    """The fewest replicas that stay below `DOWNSCALE_BELOW` of the targets; `target` while that is not known."""
    backlog = signals.held + sum(each.waiting for each in signals.replicas)
    # While replicas stop or have not reported, the reported load is not complete.
    if backlog or signals.ready > target or len(signals.replicas) < signals.ready:
        return target
    if config.target_ttft_s is not None and _ttft_s(signals) > DOWNSCALE_BELOW * config.target_ttft_s:
        return target
    running = _total(signals, "running")
    if not running:
        return 0
    max_running = [each.max_running for each in signals.replicas if each.max_running]
    concurrency_limits = [config.target_running or 0.0, state.capacity, min(max_running, default=0.0)]
    concurrency = min((each for each in concurrency_limits if each), default=0.0)
    kv_replicas = math.ceil(_total(signals, "kv_usage") / (DOWNSCALE_BELOW * config.target_kv_usage))
    return max(1, kv_replicas, math.ceil(running / (DOWNSCALE_BELOW * concurrency)) if concurrency else target)


def _capacity(signals: Signals) -> float:
    """Running requests of the replicas that keep others waiting, on average; 0: there are none."""
    running_counts = [replica.running for replica in signals.replicas if replica.waiting and replica.running]
    return sum(running_counts) / len(running_counts) if running_counts else 0.0


def _ttft_s(signals: Signals) -> float:
    return max((replica.ttft_s for replica in signals.replicas), default=0.0)


def _total(signals: Signals, name: str) -> float:
    """Sum over all ready replicas; those that have not reported count as the average of the others."""
    values = [getattr(replica, name) for replica in signals.replicas]
    return sum(values) * (max(signals.ready, len(values)) / len(values)) if values else 0.0


def _clamp(replicas: int, config: AutoscalingConfig) -> int:
    return max(config.min_replicas, min(config.max_replicas, replicas))


class EnginePolicy:
    """Autoscaling policy for Serve's controller, which calls it ten times a second; one for each deployment."""

    def __init__(self, **config: Any) -> None:
        self._config = cast("AutoscalingConfig", SimpleNamespace(**config))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas by `decide`, for an `AutoscalingContext` with the replicas' `record_autoscaling_stats`."""
        now = context.current_time or time.time()
        state_fields = State.__dataclass_fields__
        state = State(**{key: value for key, value in context.policy_state.items() if key in state_fields})
        replicas, state = decide(read(context, now), self._config, now, state)
        return replicas, asdict(state)


def read(context: Any, now: float) -> Signals:
    """The signals in Serve's context: the newest of each replica, and the largest `held` that any replica reported."""
    latest_values: dict[Any, dict[str, float]] = {}
    for name, series_by_replica in (context.raw_metrics or {}).items():
        for replica_id, series in series_by_replica.items():
            if series and now - series[-1].timestamp <= MAX_AGE_S:
                latest_values.setdefault(replica_id, {})[name] = series[-1].value
    reported = [values for values in latest_values.values() if "waiting" in values]
    held = max((values.get("held", 0.0) for values in reported), default=0.0)
    if not context.current_num_replicas:
        # No replica can report: requests that wait in Serve's own handles count.
        held = float(context.total_num_requests or 0.0)
    return Signals(
        replicas=tuple(_replica_signals(values) for values in reported),
        ready=context.current_num_replicas,
        target=context.target_num_replicas,
        held=held,
    )


def _replica_signals(values: Mapping[str, float]) -> ReplicaSignals:
    return ReplicaSignals(**{key: values[key] for key in ReplicaSignals.__dataclass_fields__ if key in values})
