"""Autoscaling decisions, alone and in a simulated fleet: bursts, ramps, oscillating load."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.config import AutoscalingConfig
from tandem.serve.autoscale import (
    DOWNSCALE_BELOW,
    MAX_AGE_S,
    TTFT_SETTLING_S,
    EnginePolicy,
    ReplicaSignals,
    Signals,
    State,
    decide,
)

CONFIG = AutoscalingConfig(min_replicas=1, max_replicas=8, target_waiting=2, upscale_delay_s=2, downscale_delay_s=30)
ZERO = replace(CONFIG, min_replicas=0)
FULL = ReplicaSignals(running=4, waiting=2, kv_usage=0.1, max_running=4)
IDLE = ReplicaSignals(max_running=4)


def fleet(*replicas: ReplicaSignals, target: int | None = None, held: float = 0.0) -> Signals:
    return Signals(replicas=replicas, ready=len(replicas), target=target or len(replicas), held=held)


def after(signals: Signals, config: AutoscalingConfig, seconds: float, state: State | None = None) -> int:
    """The decision once these signals have held for so long."""
    start = 1000.0
    _, state = decide(signals, config, start, state or State(ready=signals.ready))
    return decide(signals, config, start + seconds, state)[0]


def test_a_backlog_within_the_target_adds_no_replica() -> None:
    assert after(fleet(FULL), CONFIG, 100) == 1


def test_a_backlog_adds_the_replicas_that_can_run_it_at_once() -> None:
    # Each new one works on 4, as the one does, and 2 may wait for it: 2 + 6 * n takes 20 for n = 3.
    crowded = fleet(replace(FULL, waiting=20))
    assert after(crowded, CONFIG, 2) == 4
    assert after(fleet(replace(FULL, waiting=500)), CONFIG, 2) == CONFIG.max_replicas


def test_a_short_backlog_adds_no_replica() -> None:
    crowded = fleet(replace(FULL, waiting=20))
    _, state = decide(crowded, CONFIG, 0.0, State())
    _, state = decide(fleet(FULL), CONFIG, 1.9, state)
    assert decide(crowded, CONFIG, 2.5, state)[0] == 1


def test_starting_replicas_count_as_added() -> None:
    crowded = replace(fleet(replace(FULL, waiting=20)), target=4)
    assert after(crowded, CONFIG, 20) == 4


def test_requests_held_by_gateways_count_as_waiting() -> None:
    assert after(fleet(replace(FULL, waiting=0), held=20), CONFIG, 2) > 1


def test_kv_usage_adds_replicas_in_proportion() -> None:
    full = replace(FULL, waiting=0, kv_usage=0.95)
    assert after(fleet(full, full), CONFIG, 2) == 3


def test_slow_first_tokens_add_one_replica_and_then_wait_for_its_effect() -> None:
    config = replace(CONFIG, target_ttft_s=0.5)
    slow = replace(IDLE, running=1, ttft_s=0.9)
    calm = State(ready=2, changed_at=0.0)
    assert after(fleet(slow, slow), config, 2, calm) == 3
    # Two have just become three: what was slow before them is still remembered by the engines.
    _, state = decide(fleet(slow, slow, slow), config, 1000.0, calm)
    assert decide(fleet(slow, slow, slow), config, 1000.0 + TTFT_SETTLING_S - 1, state)[0] == 3
    assert after(fleet(slow, slow), CONFIG, 20, calm) == 2


def test_running_requests_above_the_target_add_replicas_in_proportion() -> None:
    config = replace(CONFIG, target_running=8)
    assert after(fleet(replace(IDLE, running=20)), config, 2) == 3


def test_the_first_request_starts_a_replica_at_once() -> None:
    assert decide(Signals(held=1), ZERO, 0.0, State())[0] == 1
    assert decide(Signals(), ZERO, 0.0, State())[0] == 0


def test_no_replica_is_added_while_the_first_one_starts() -> None:
    assert after(Signals(target=1), ZERO, 10_000) == 1


def test_an_idle_model_loses_its_last_replica_after_a_delay_of_its_own() -> None:
    config = replace(ZERO, downscale_to_zero_delay_s=100)
    assert after(fleet(IDLE), config, 99) == 1
    assert after(fleet(IDLE), config, 100) == 0
    assert after(fleet(IDLE), CONFIG, 10_000) == 1
    # Of two the last one stays longer.
    assert after(fleet(IDLE, IDLE), config, 30) == 1


def test_a_single_request_keeps_the_last_replica() -> None:
    assert after(fleet(replace(IDLE, running=1)), ZERO, 10_000) == 1


def test_replicas_are_removed_only_if_the_others_stay_well_below_the_targets() -> None:
    # Together 10 of 16 slots: three have 12, of which 70 % are 8.4.
    busy = replace(IDLE, running=2.5)
    assert after(fleet(busy, busy, busy, busy), CONFIG, 100) == 4
    easy = replace(IDLE, running=2.0)
    assert after(fleet(easy, easy, easy, easy), CONFIG, 30) == 3


def test_the_largest_number_required_during_the_delay_remains() -> None:
    five = fleet(*[IDLE] * 5)
    _, state = decide(five, CONFIG, 0.0, State(ready=5))
    # In between there was work for three.
    _, state = decide(fleet(*[replace(IDLE, running=1.5)] * 5), CONFIG, 15.0, state)
    assert decide(five, CONFIG, 29.0, state)[0] == 5
    assert decide(five, CONFIG, 30.0, state)[0] == 3


def test_no_replica_is_removed_while_reports_are_missing_or_one_is_stopping() -> None:
    silent = Signals(replicas=(IDLE,), ready=2, target=2)
    assert after(silent, CONFIG, 10_000) == 2
    changing = Signals(replicas=(IDLE, IDLE, IDLE), ready=3, target=2)
    assert after(changing, CONFIG, 10_000) == 2


def test_new_bounds_apply_at_once() -> None:
    assert decide(fleet(IDLE), replace(CONFIG, min_replicas=3), 0.0, State())[0] == 3
    assert decide(fleet(*[FULL] * 9), CONFIG, 0.0, State())[0] == 8


@dataclass
class Simulation:
    """Replicas with slots, a queue that they share, and the decider, in steps of half a second."""

    config: AutoscalingConfig
    slots: int = 4
    service_s: float = 4.0
    start_s: float = 10.0
    ready: int = 1
    starting: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    waiting: float = 0.0
    arrived: float = 0.0
    state: State = field(default_factory=State)
    targets: list[int] = field(default_factory=list)
    queues: list[float] = field(default_factory=list)

    def run(self, rate: Callable[[float], float], until_s: float, step_s: float = 0.5) -> Simulation:
        """Requests a second as a function of time."""
        target = self.ready
        told: list[Signals] = []
        for step in range(int(until_s / step_s)):
            now = step * step_s
            self.ready += sum(at <= now for at in self.starting)
            self.starting = [at for at in self.starting if at > now]
            self.running = [end for end in self.running if end > now]
            self.arrived += rate(now) * step_s
            self.waiting += int(self.arrived)
            self.arrived -= int(self.arrived)
            begun = int(min(self.waiting, self.ready * self.slots - len(self.running)))
            if begun > 0:
                self.running += [now + self.service_s] * begun
                self.waiting -= begun
            each = ReplicaSignals(
                running=len(self.running) / max(self.ready, 1),
                waiting=self.waiting / max(self.ready, 1),
                max_running=self.slots,
            )
            held = 0.0 if self.ready else self.waiting
            told.append(Signals(replicas=(each,) * self.ready, ready=self.ready, target=target, held=held))
            # Signals are two seconds old when they are decided on.
            seen = replace(told[max(0, step - 4)], target=target, ready=self.ready)
            target, self.state = decide(seen, self.config, now, self.state)
            alive = self.ready + len(self.starting)
            self.starting += [now + self.start_s] * max(0, target - alive)
            if target < alive:
                self.starting = self.starting[: max(0, target - self.ready)]
                self.ready = min(self.ready, target)
            self.targets.append(target)
            self.queues.append(self.waiting)
        return self

    def turns(self) -> int:
        """How often the number went the other way than before."""
        steps = [b - a for a, b in zip(self.targets, self.targets[1:], strict=False) if a != b]
        return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))


def test_a_burst_takes_two_changes_at_most_and_returns_to_the_start() -> None:
    # 6 replicas' worth: 4 slots, 4 seconds each, so a replica does one request a second.
    run = Simulation(CONFIG).run(lambda t: 5.5 if 10 <= t < 130 else 0.2, 300)
    changes = [b for a, b in zip(run.targets, run.targets[1:], strict=False) if b > a]
    assert max(run.targets) >= 6
    assert len(changes) <= 4
    assert run.targets[-1] == 1 and run.queues[-1] == 0
    assert run.turns() == 1
    assert all(1 <= target <= 8 for target in run.targets)


def test_a_ramp_is_followed_up_and_down_monotonically() -> None:
    run = Simulation(CONFIG).run(lambda t: 6 * (1 - abs(t - 300) / 300), 700)
    assert run.turns() == 1
    assert max(run.targets) >= 6 and run.targets[-1] == 1
    # What waits never grows beyond some seconds of work.
    assert max(run.queues) < 60


@pytest.mark.parametrize("period_s", [5.0, 20.0, 40.0])
def test_load_that_swings_faster_than_the_delay_does_not_make_the_number_swing(period_s: float) -> None:
    run = Simulation(CONFIG).run(lambda t: 4.0 if t % period_s < period_s / 2 else 0.5, 600)
    late = run.targets[len(run.targets) // 3 :]
    assert len(set(late)) == 1


def test_steady_load_settles_whatever_it_is() -> None:
    for tenths in range(2, 75, 3):
        run = Simulation(CONFIG).run(lambda t, rate=tenths / 10: rate, 600)
        late = run.targets[len(run.targets) // 2 :]
        assert len(set(late)) == 1, tenths
        assert run.queues[-1] <= 8 * CONFIG.target_waiting


def test_requests_to_a_model_at_zero_start_a_replica_and_it_returns_to_zero() -> None:
    run = Simulation(ZERO, ready=0).run(lambda t: 1.0 if 20 <= t < 25 else 0.0, 200)
    assert run.targets[0] == 0 and max(run.targets) >= 1 and run.targets[-1] == 0
    assert run.queues[-1] == 0 and run.turns() == 1


def context(now: float, values: dict[str, dict[str, tuple[float, float]]], **more: Any) -> Any:
    """An AutoscalingContext's parts: per metric and replica one point, (time, value)."""
    points = {
        name: {replica: [SimpleNamespace(timestamp=at, value=value)] for replica, (at, value) in each.items()}
        for name, each in values.items()
    }
    about = {"current_num_replicas": 2, "target_num_replicas": 2, "policy_state": {}, "total_num_requests": 0.0}
    return SimpleNamespace(raw_metrics=points, current_time=now, **{**about, **more})


def test_the_policy_reads_recorded_signals_and_ignores_old_ones() -> None:
    policy = EnginePolicy(**asdict(replace(CONFIG, upscale_delay_s=0)))
    fresh = {"waiting": {"a": (99.0, 20.0), "b": (99.0, 0.0)}, "running": {"a": (99.0, 4.0), "b": (99.0, 4.0)}}
    assert policy(context(100.0, fresh))[0] > 2
    assert policy(context(99.0 + MAX_AGE_S + 1, fresh))[0] == 2
    # Each replica is told of all that gateways hold; it counts once.
    told = {name: {"a": (99.0, value), "b": (99.0, value)} for name, value in (("waiting", 0.0), ("held", 5.0))}
    assert policy(context(100.0, told))[0] == 3
    assert policy(context(100.0, {}, current_num_replicas=0, target_num_replicas=0, total_num_requests=1.0))[0] == 1


def test_the_policys_state_survives_serves_serialisation() -> None:
    policy = EnginePolicy(**asdict(CONFIG))
    crowded = {"waiting": {"a": (100.0, 50.0)}, "running": {"a": (100.0, 4.0)}}
    one = {"current_num_replicas": 1, "target_num_replicas": 1}
    replicas, state = policy(context(100.0, crowded, **one))
    assert replicas == 1
    kept = {**state, "_serve_keeps": "more than this"}
    assert policy(context(102.0, crowded, policy_state=kept, **one))[0] > 1


def test_a_controller_that_lacks_this_package_can_run_the_policy() -> None:
    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(policy_function="tandem.serve.autoscale:EnginePolicy", policy_kwargs=asdict(CONFIG))
    script = (
        "import sys, pickle; sys.modules['tandem'] = None; "
        f"policy = pickle.loads({policy.get_serialized_policy_def()!r})(**{asdict(CONFIG)!r}); "
        "from types import SimpleNamespace as S; "
        "print(policy(S(raw_metrics={}, current_time=1.0, current_num_replicas=0, target_num_replicas=5, policy_state={},"
        " total_num_requests=0.0))[0])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "5", ran.stderr
    assert DOWNSCALE_BELOW < 1
