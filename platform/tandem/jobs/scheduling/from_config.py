"""The scheduler's records from the config of a cluster."""

from __future__ import annotations

from tandem.config.scheduling import SchedulingConfig
from tandem.jobs.scheduling.records import Policy, Tenant


def policy(config: SchedulingConfig) -> Policy:
    """The scheduler's settings."""
    return Policy(
        half_life_s=config.half_life_s,
        default_time_limit_s=config.time_limit_s(None),
        aging_s=config.aging_s,
        starvation_s=config.starvation_s,
        min_run_s=config.min_run_s,
        max_preemptions=config.max_preemptions,
        give_back_s=config.give_back_s,
    )


def tenants(config: SchedulingConfig) -> list[Tenant]:
    """The tenants with rights of their own."""
    return [
        Tenant(
            name=name,
            weight=share.weight,
            quota_cpus=share.quota.cpus,
            quota_gpus=share.quota.gpus,
            limit_cpus=share.limit.cpus,
            limit_gpus=share.limit.gpus,
        )
        for name, share in config.tenants.items()
    ]
