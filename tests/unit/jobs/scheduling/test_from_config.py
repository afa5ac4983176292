"""Config of the scheduler, as the scheduler uses it."""

from __future__ import annotations

from tandem.config import SchedulingConfig, from_dict
from tandem.jobs.scheduling import ClusterState, Node, Policy, Resources
from tandem.jobs.scheduling.from_config import policy, tenants


def test_quotas_and_limits_of_the_config_are_the_tenants() -> None:
    config = from_dict(
        SchedulingConfig,
        {
            "tenants": {"a": {"weight": 3, "quota": {"gpus": 2}}, "b": {"limit": {"gpus": 4}}},
            "default_time_limit": "30",
        },
    )
    state = ClusterState(policy(config), tenants(config), [Node(id="n", cpus=40, gpus=8)])
    assert state.policy.default_time_limit_s == 1800
    assert state.quota("a") == Resources(30, 2)
    assert state.quota("b") == Resources(10, 2)
    assert state.accounts["b"].tenant.limit.gpus == 4


def test_the_defaults_of_config_and_scheduler_are_the_same() -> None:
    assert policy(SchedulingConfig()) == Policy()
