"""Scheduler of one cluster for training and serving: `decide` returns what starts, waits and gives way. Pure.

Ghodsi et al., "Dominant Resource Fairness" (NSDI 2011), for fair shares; Lifka, "The ANL/IBM SP scheduling system" (JSSPP 1995),
for backfill.
"""

from tandem.jobs.scheduling.decide import decide
from tandem.jobs.scheduling.decisions import (
    Decision,
    Grow,
    Hold,
    Preempt,
    ReleaseReplicas,
    Shrink,
    Start,
    StartReplicas,
    Stop,
)
from tandem.jobs.scheduling.explain import explain
from tandem.jobs.scheduling.records import Job, Node, Placement, Policy, Run, ServingDemand, Tenant
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.state import ClusterState

__all__ = [
    "ClusterState",
    "Decision",
    "Grow",
    "Hold",
    "Job",
    "Node",
    "Placement",
    "Policy",
    "Preempt",
    "ReleaseReplicas",
    "Resources",
    "Run",
    "ServingDemand",
    "Shrink",
    "Start",
    "StartReplicas",
    "Stop",
    "Tenant",
    "decide",
    "explain",
]
