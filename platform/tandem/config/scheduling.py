"""Config of the scheduler: tenants' shares, quotas and limits, priority classes, time limits; and what one job asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.config import check
from tandem.config.slurm import TIME, time_limit
from tandem.errors import ConfigError

PRIORITY_CLASSES = {"low": -1, "normal": 0, "high": 1}
"""Levels of the priority classes that a cluster has by default."""
SERVING_LEVEL = 100
"""Level of serving by default: above all training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AmountsConfig:
    """CPUs and GPUs of a quota or limit."""

    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantShareConfig:
    """What a tenant may use of the cluster."""

    weight: float = 1.0
    """Relative claim to the cluster where tenants compete."""
    quota: AmountsConfig = field(default_factory=AmountsConfig)
    """What the tenant gets back from those who borrow it; unset amounts: its share by weight."""
    limit: AmountsConfig = field(default_factory=AmountsConfig)
    """What the tenant never exceeds, borrowed resources included; unset amounts: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingConfig:
    """Scheduling of a cluster's jobs and replicas."""

    tenants: dict[str, TenantShareConfig] = field(default_factory=dict)
    """Shares by tenant; others have weight 1, and neither quota nor limit of their own."""
    priority_classes: dict[str, int] = field(default_factory=lambda: dict(PRIORITY_CLASSES))
    """Level of each priority class; higher first."""
    default_priority: str = "normal"
    """Priority class of jobs that name none."""
    serving_level: int = SERVING_LEVEL
    """Level of serving; jobs of lower levels give way to replicas."""
    default_time_limit: str = "1-00:00:00"
    """Time limit of jobs that have none, in one of Slurm's forms, such as 02:00:00 or 1-12:00:00."""
    max_time_limit: str | None = None
    """Longest time limit that a job may ask for; unset: any."""
    half_life_s: float = 24 * 3600.0
    """Time after which past use counts half in a tenant's fair share."""
    aging_s: float = 6 * 3600.0
    """Waiting time that raises a job by one priority level among its tenant's jobs."""
    starvation_s: float = 24 * 3600.0
    """Time as its tenant's first job after which a job precedes all others."""
    min_run_s: float = 600.0
    """Run time before a run is preempted or resized."""
    max_preemptions: int = 3
    """Preemptions after which a job is not preempted any more."""
    give_back_s: float = 300.0
    """Time for which a replica must not have been needed before training gets its resources."""

    @staticmethod
    def as_written(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings as they are; durations must be text."""
        return with_quoted_durations(values)

    def __post_init__(self) -> None:
        for name, tenant in self.tenants.items():
            _check_tenant(f"tenants.{name}", tenant)
        if not self.priority_classes:
            raise ConfigError("priority_classes is empty; it must have at least one class, such as normal: 0.")
        for name, level in self.priority_classes.items():
            if level >= self.serving_level:
                raise ConfigError(
                    f"priority_classes.{name} is {level} and serving_level {self.serving_level}: jobs of that class would never "
                    "give way to serving. Raise serving_level, or lower the class."
                )
        check.one_of("default_priority", self.default_priority, self.priority_classes)
        default_s = duration_s("default_time_limit", self.default_time_limit)
        if self.max_time_limit is not None and default_s > duration_s("max_time_limit", self.max_time_limit):
            raise ConfigError(
                f"default_time_limit is {self.default_time_limit}, above max_time_limit {self.max_time_limit}. Lower it."
            )
        for key in ("half_life_s", "aging_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be above 0.")
        for key in ("starvation_s", "min_run_s", "max_preemptions", "give_back_s"):
            check.at_least(key, getattr(self, key), 0)

    def level(self, priority: str | None) -> int:
        """Level of a priority class; None: of the default one."""
        name = self.default_priority if priority is None else priority
        check.one_of("scheduling.priority", name, self.priority_classes)
        return self.priority_classes[name]

    def time_limit_s(self, limit: str | None) -> float:
        """Seconds of a job's time limit; None: of the default one."""
        seconds = duration_s("scheduling.time_limit", self.default_time_limit if limit is None else limit)
        if self.max_time_limit is not None and seconds > duration_s("max_time_limit", self.max_time_limit):
            raise ConfigError(
                f"scheduling.time_limit is {limit}; this cluster allows at most {self.max_time_limit}. Lower it: a job that is "
                "stopped at its limit has a checkpoint, and goes on when it is submitted again."
            )
        return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSchedulingConfig:
    """What one job asks of the scheduler."""

    priority: str | None = None
    """Priority class; unset: the cluster's default."""
    time_limit: str | None = None
    """Longest run time over all restarts, in one of Slurm's forms; unset: the cluster's default. Short ones start sooner."""
    preemptible: bool = True
    """Whether the job may be stopped, or made smaller, for others; it goes on later from a checkpoint."""

    @staticmethod
    def as_written(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings as they are; durations must be text."""
        return with_quoted_durations(values)

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            duration_s("scheduling.time_limit", self.time_limit)


def duration_s(key: str, text: str) -> float:
    """Seconds of a duration in one of Slurm's forms; ConfigError for others, and for 0."""
    limit = time_limit(text) if TIME.fullmatch(text) else None
    if limit is None:
        raise ConfigError(
            f"{key} is {text!r}; it must be a duration above 0, such as 30 (minutes), 02:00:00 or 1-12:00:00 (days first)."
        )
    return limit.total_seconds()


def with_quoted_durations(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values; ConfigError where a duration among them is not text."""
    for key in ("default_time_limit", "max_time_limit", "time_limit"):
        value = values.get(key)
        if isinstance(value, int):
            # YAML 1.1 reads 12:00:00 as 43200, and 30 may be meant as minutes.
            raise ConfigError(
                f'{key} is a number, {value}; put it in quotes, such as "12:00:00", or "30" for 30 minutes.'
            )
    return values


def _check_tenant(key: str, tenant: TenantShareConfig) -> None:
    if not tenant.weight > 0:
        raise ConfigError(f"{key}.weight is {tenant.weight}; it must be above 0.")
    for name in ("cpus", "gpus"):
        quota, limit = getattr(tenant.quota, name), getattr(tenant.limit, name)
        for kind, amount in (("quota", quota), ("limit", limit)):
            if amount is not None:
                check.at_least(f"{key}.{kind}.{name}", amount, 0)
        if quota is not None and limit is not None and quota > limit:
            raise ConfigError(f"{key}.quota.{name} is {quota:g}, above {key}.limit.{name} {limit:g}. Raise the limit.")
