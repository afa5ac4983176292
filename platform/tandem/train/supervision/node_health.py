"""Node health after a fault: bad nodes are cordoned before the next attempt, where TANDEM_CORDON_ON says so."""

from __future__ import annotations

import logging

from tandem.cluster.health.nodes import apply_policy, examine
from tandem.cluster.health.policy import parse_kinds
from tandem.observability.events import Notice
from tandem.observability.journal import Journal
from tandem.settings import settings

log = logging.getLogger(__name__)


def cordon_bad_nodes(journal: Journal) -> None:
    """Examine every node, and cordon the bad ones by the policy; nothing without one. A failed examination stops no run."""
    try:
        if kinds := parse_kinds(settings().cordon_on):
            for report, finding in apply_policy(examine(), kinds, by=f"job {journal.path.parent.name}").cordon:
                journal.write(Notice(message=f"Node {report.address} is cordoned: {finding.says}."))
    except Exception as error:  # noqa: BLE001 - the run goes on as it would without a policy
        log.warning("The nodes' health is not known: %s", error)
