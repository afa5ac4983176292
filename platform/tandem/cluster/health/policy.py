"""Which findings cordon a node without a person: the setting TANDEM_CORDON_ON. Pure.

At most half of the nodes that are alive are cordoned in this way: a fault of more is one of the cluster, such as its file system.
A node that does not answer is reported only: Ray places nothing on a dead one, and a slow one would stay out after it recovers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.cluster.health.report import KINDS, Finding, NodeReport
from tandem.errors import ConfigError, did_you_mean

REPORTED_ONLY = "node_silent"
POLICY_KINDS = tuple(kind for kind in KINDS if kind != REPORTED_ONLY)
"""Kinds that a policy may name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Nodes to cordon, and those that the limit of half a cluster leaves in."""

    cordon: tuple[tuple[NodeReport, Finding], ...] = ()
    spared: tuple[NodeReport, ...] = ()


def parse_kinds(setting: str | None) -> frozenset[str]:
    """The kinds in `gpu_xid, gpu_ecc`; ConfigError for one that does not exist or cordons no node."""
    kinds = [kind.strip() for kind in (setting or "").split(",") if kind.strip()]
    for kind in kinds:
        if kind == REPORTED_ONLY:
            raise ConfigError(
                f"TANDEM_CORDON_ON names {kind}, which is reported and cordons no node: the cordon would outlast the silence. "
                "Leave it out."
            )
        if kind not in POLICY_KINDS:
            raise ConfigError(
                f"TANDEM_CORDON_ON names {kind!r}.{did_you_mean(kind, POLICY_KINDS)} The kinds are: {', '.join(POLICY_KINDS)}."
            )
    return frozenset(kinds)


def decide(reports: Sequence[NodeReport], kinds: frozenset[str]) -> Decision:
    """The nodes with a bad finding of one of `kinds`, the worst first; those that are cordoned already count for the limit.

    Dead nodes are neither cordoned nor counted.
    """
    alive = [report for report in reports if report.alive]
    bad: list[tuple[NodeReport, Finding]] = []
    for report in alive:
        causes = [finding for finding in report.findings if finding.severity == "bad" and finding.kind in kinds]
        if causes and report.cordon is None:
            bad.append((report, causes[0]))
    bad.sort(key=lambda pair: -sum(finding.severity == "bad" for finding in pair[0].findings))
    room = max(0, len(alive) // 2 - sum(report.cordon is not None for report in alive))
    return Decision(cordon=tuple(bad[:room]), spared=tuple(report for report, _ in bad[room:]))
