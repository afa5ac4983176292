"""Which findings cordon a node without a person: the setting TANDEM_CORDON_ON. Pure.

At most half of a cluster is cordoned in this way: a fault of more nodes is one of the cluster, such as its file system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.cluster.health.report import KINDS, Finding, NodeReport
from tandem.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Nodes to cordon, and those that the limit of half a cluster leaves in."""

    cordon: tuple[tuple[NodeReport, Finding], ...] = ()
    spared: tuple[NodeReport, ...] = ()


def parse_kinds(setting: str | None) -> frozenset[str]:
    """The kinds in `gpu_xid, gpu_ecc`; ConfigError for one that does not exist."""
    kinds = [kind.strip() for kind in (setting or "").split(",") if kind.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"TANDEM_CORDON_ON names {kind!r}.{did_you_mean(kind, KINDS)} The kinds are: {', '.join(KINDS)}."
            )
    return frozenset(kinds)


def decide(reports: Sequence[NodeReport], kinds: frozenset[str]) -> Decision:
    """The nodes with a bad finding of one of `kinds`, the worst first; those that are cordoned already count for the limit."""
    bad: list[tuple[NodeReport, Finding]] = []
    for report in reports:
        causes = [finding for finding in report.findings if finding.severity == "bad" and finding.kind in kinds]
        if causes and report.cordon is None:
            bad.append((report, causes[0]))
    bad.sort(key=lambda pair: -sum(finding.severity == "bad" for finding in pair[0].findings))
    room = max(0, len(reports) // 2 - sum(report.cordon is not None for report in reports))
    return Decision(cordon=tuple(bad[:room]), spared=tuple(report for report, _ in bad[room:]))
