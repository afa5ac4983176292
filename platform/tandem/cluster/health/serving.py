"""Serving requirements of a node: the variables that Ray Serve was started with, HAProxy and its admin socket.

`tandem node start` and local clusters set all of it (`tandem.cluster.haproxy`); a cluster that was started otherwise may lack
some.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from tandem.cluster.health.report import Finding, Severity
from tandem.settings import LONGEST_DRAIN_S

ENABLED, HARD_STOP = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
SOCKET, BINARY = "RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_BINARY_PATH"
RAYS_HARD_STOP_S = 120.0
"""Ray Serve's value where the variable is not set."""
RAYS_SOCKET = "/tmp/haproxy-serve/admin.sock"
START = "Start the node by `tandem node start`"


def check_serving(environment: Mapping[str, str], *, drain_timeout_s: float = LONGEST_DRAIN_S) -> list[Finding]:
    """Findings about a node of which Ray's processes have `environment`; files are looked at on this machine.

    `drain_timeout_s`: how long streams of a replaced replica may go on, in seconds.
    """
    if environment.get(ENABLED) != "1":
        says = "HAProxy is off: Ray Serve's Python proxy handles each chunk of a stream, and a change of gateways can cut streams"
        return [_finding("warning", says, f"{START}, or set {ENABLED}=1 before `ray start`.")]
    found = []
    hard_stop = _seconds(environment.get(HARD_STOP))
    if hard_stop < drain_timeout_s:
        says = f"HAProxy cuts streams {hard_stop:g} s after a reload; drain_timeout_s lets them go on for {drain_timeout_s:g} s"
        fix = f"{START}, set {HARD_STOP}={LONGEST_DRAIN_S} before `ray start`, or lower drain_timeout_s."
        found.append(_finding("bad", says, fix))
    if (problem := socket_problem(Path(environment.get(SOCKET) or RAYS_SOCKET))) is not None:
        fix = f"{START}, or set {SOCKET} to a path in a folder of mode 0700 before `ray start`."
        found.append(_finding("bad", f"HAProxy's admin socket is not private: {problem}", fix))
    binary = environment.get(BINARY)
    if binary and shutil.which(binary) is None:
        says = f"{BINARY} is {binary}, which cannot be executed"
        found.append(_finding("bad", says, f"Run `make setup` there and start Ray again, or correct {BINARY}."))
    if not found:
        says = f"HAProxy is on, its admin socket private, its hard stop {hard_stop:g} s after a reload"
        found = [Finding(kind="serving", severity="ok", says=says)]
    return found


def socket_problem(path: Path) -> str | None:
    """Why other users could use a socket at `path`; None if they cannot.

    Ray lets everybody connect to it (mode 666), so one of its folders has to keep others out. Whoever reaches it can reconfigure
    HAProxy and take over its listeners.
    """
    for folder in path.parents:
        try:
            status = folder.stat()
        except OSError:
            continue
        if not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            return None if status.st_uid == os.geteuid() else f"{folder} belongs to another user"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return f"{path} would lie where every user of the machine can connect to it"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"every user of the machine can connect to {path} (mode {mode:04o})"
    return None


def _seconds(value: str | None) -> float:
    try:
        return float(value or RAYS_HARD_STOP_S)
    except ValueError:
        return RAYS_HARD_STOP_S


def _finding(severity: Severity, says: str, fix: str) -> Finding:
    return Finding(kind="serving", severity=severity, says=says, fix=fix)
