"""Xid errors: the NVIDIA driver's messages in the kernel's log. Pure.

The meaning of a code and what it asks for follow NVIDIA's catalog (https://docs.nvidia.com/deploy/xid-errors/), for Ampere and
newer GPUs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from tandem.cluster.health.report import Finding, Severity

LINE = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<device>[0-9a-fA-F:.]+)[^)]*\): (?P<code>\d+)(?:, (?P<text>.*))?")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\S+")
"""The time at the start of a line: `dmesg --time-format iso`, `journalctl -o short-iso`."""
APPLICATION = frozenset({8, 11, 13, 31, 32, 43, 45, 68, 69, 80})
"""Faults that a program causes by itself, and what follows from its end: no sign of a bad GPU."""
RESET, REBOOT = "Reset the GPU (`nvidia-smi --gpu-reset`) with nothing running on it.", "Reboot the machine."
CODES: dict[int, tuple[Severity, str, str]] = {
    48: ("bad", "uncorrectable memory error", RESET),
    54: ("bad", "auxiliary power is not connected", "Check the GPU's power cables."),
    62: ("bad", "the power controller has halted", RESET),
    63: (
        "warning",
        "a memory row was remapped or a page retired",
        "Reset the GPU when it is idle; watch whether it goes on.",
    ),
    64: ("bad", "a memory row could not be remapped", f"{RESET} If it comes again, have the GPU replaced."),
    74: ("bad", "NVLink error", f"{RESET} Compare `nvidia-smi nvlink --status` with a good node."),
    79: ("bad", "the GPU has fallen off the bus", f"{REBOOT} If it comes again, have the GPU and its slot checked."),
    92: ("warning", "many correctable memory errors", "Watch whether uncorrectable errors follow."),
    94: ("warning", "memory error, contained in one program", "Reset the GPU when it is idle."),
    95: ("bad", "memory error, not contained", RESET),
    109: ("bad", "context switch timeout", RESET),
    110: ("bad", "security fault", "Power the machine off and on."),
    119: (
        "bad",
        "the GPU's system processor does not answer",
        f"{RESET} If it comes again, power the machine off and on.",
    ),
    120: ("bad", "error of the GPU's system processor", f"{RESET} If it comes again, power the machine off and on."),
    136: ("bad", "NVLink training has failed", RESET),
    140: ("bad", "uncorrectable memory error", RESET),
}
"""Codes of hardware: severity, meaning, next step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Xid:
    """One message."""

    device: str
    """PCI address, such as `0000:3b:00`."""
    code: int
    text: str = ""
    at: datetime | None = None
    """When it was written; None where the log gives no time with a zone."""


def parse_kernel_log(lines: Iterable[str]) -> list[Xid]:
    """The Xid messages in lines of `dmesg` or `journalctl -k`, in their order."""
    return [
        Xid(
            device=match["device"].lower(),
            code=int(match["code"]),
            text=(match["text"] or "").strip(),
            at=_time(line),
        )
        for line in lines
        if (match := LINE.search(line))
    ]


def _time(line: str) -> datetime | None:
    match = TIME.match(line)
    try:
        time = datetime.fromisoformat(match[0]) if match else None
    except ValueError:
        return None
    return time if time and time.tzinfo else None


def check_xids(messages: Iterable[Xid], since: datetime | None = None) -> list[Finding]:
    """One finding for each GPU and code; none for faults that programs cause.

    Messages from before `since` are left out; those without a time count.
    """
    counted = Counter(
        (message.device, message.code)
        for message in messages
        if message.code not in APPLICATION and not (since and message.at and message.at < since)
    )
    start = f"since {since:%Y-%m-%d %H:%M} UTC" if since else "since the log begins"
    return [_finding(device, code, count, start) for (device, code), count in sorted(counted.items())]


def _finding(device: str, code: int, count: int, start: str) -> Finding:
    unknown: tuple[Severity, str, str] = (
        "warning",
        "see NVIDIA's catalog",
        "Look the code up in NVIDIA's Xid catalog.",
    )
    severity, meaning, fix = CODES.get(code, unknown)
    times = "once" if count == 1 else f"{count} times"
    return Finding(
        kind="gpu_xid",
        severity=severity,
        says=f"GPU {device}: Xid {code} ({meaning}), {times} {start}",
        fix=fix,
        values={"device": device, "xid": code, "count": count},
    )
