"""Tenants' use of the cluster: what each holds now, has held lately, and may hold.

Fair share is dominant resource fairness: a tenant's dominant share is the larger of its shares of CPUs and GPUs, divided by its
weight. It is taken of what the tenant holds now or of its decayed average, whichever is more, so that who used much lately waits
for those who did not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.jobs.scheduling.records import Tenant
from tandem.jobs.scheduling.resources import Resources


@dataclass(slots=True)
class TenantAccount:
    """Use of the cluster by one tenant."""

    tenant: Tenant
    half_life_s: float
    held: Resources = field(default_factory=Resources)
    """Held by its runs now."""
    average: Resources = field(default_factory=Resources)
    """Held on average, older times weighing less, at `updated_s`."""
    updated_s: float = 0.0

    def average_at(self, now: float) -> Resources:
        """The decayed average at a later time."""
        kept: float = 0.5 ** (max(0.0, now - self.updated_s) / self.half_life_s)
        return self.average * kept + self.held * (1.0 - kept)

    def add(self, amount: Resources, now: float) -> None:
        """Change what the tenant holds."""
        self.average = self.average_at(now)
        self.updated_s = max(self.updated_s, now)
        self.held = self.held + amount

    def weighted_share(self, capacity: Resources, now: float, more: Resources | None = None) -> float:
        """Dominant share over weight, with `more` held as well."""
        held = self.held if more is None else self.held + more
        share = max(held.share_of(capacity), self.average_at(now).share_of(capacity))
        return share / self.tenant.weight


def quota(tenant: Tenant, capacity: Resources, total_weight: float) -> Resources:
    """What a tenant gets back from borrowers: its quota, where unset its share of `capacity` by weight."""
    share = tenant.weight / total_weight
    return Resources(
        capacity.cpus * share if tenant.quota_cpus is None else tenant.quota_cpus,
        capacity.gpus * share if tenant.quota_gpus is None else tenant.quota_gpus,
    )
