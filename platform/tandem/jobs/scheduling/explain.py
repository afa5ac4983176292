"""The reason for which any one job waits."""

from __future__ import annotations

from tandem.jobs.scheduling import reasons
from tandem.jobs.scheduling.decide import SchedulingPass
from tandem.jobs.scheduling.decisions import Hold, Start
from tandem.jobs.scheduling.state import ClusterState


def explain(state: ClusterState, tenant: str, job_id: str, now: float) -> Hold | Start:
    """The decision about a waiting job at a time, with its reason."""
    queue = state.queues[tenant]
    holds = {}
    for decision in SchedulingPass(state, now, job_id).run():
        if isinstance(decision, Hold):
            holds[decision.job_id] = decision
        if isinstance(decision, Hold | Start) and decision.job_id == job_id:
            return decision
    ahead = queue.ahead_of(queue[job_id])
    first = queue.head()
    assert first is not None
    reason = reasons.in_line(ahead, tenant)
    if first.id in holds:
        reason += f", of which the first, {first.id}, {holds[first.id].reason}"
    return Hold(job_id=job_id, reason=reason)
