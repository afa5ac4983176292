"""Disks, shared memory and limits of this machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from tandem.cluster.health.report import Finding

DISK_NEEDED, DISK_WANTED = 2**29, 5 * 2**30
"""Bytes: below the first a job or an app fails soon; below the second a checkpoint may."""
INODES_WANTED = 10_000
SHM_WANTED = 512 * 2**20
FILES_WANTED = 4096
"""Open files: a gateway has two for each stream."""


def check_disks(folders: Mapping[str, Path]) -> list[Finding]:
    """Findings about free space. `folders`: what is written there, such as `TANDEM_HOME`, and where it is."""
    found, seen = [], set()
    for use, folder in folders.items():
        place = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
        try:
            usage, inodes, device = shutil.disk_usage(place), os.statvfs(place), place.stat().st_dev
        except OSError as error:
            says = f"{use} ({folder}) cannot be read: {error.strerror or error}"
            found.append(
                Finding(kind="disk", severity="bad", says=says, fix="Mount it again, or check its permissions.")
            )
            continue
        if not os.access(place, os.W_OK):
            says = f"{use} ({folder}) cannot be written"
            found.append(
                Finding(kind="disk", severity="bad", says=says, fix="Mount it for writing, or correct its owner.")
            )
        if device in seen:
            continue
        seen.add(device)
        says = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB are free at {use} ({folder})"
        fix = f"Remove files there, or set {use} to another disk."
        values = {"free": usage.free, "total": usage.total}
        if usage.free < DISK_NEEDED:
            found.append(Finding(kind="disk", severity="bad", says=says, fix=fix, values=values))
        elif usage.free < DISK_WANTED:
            found.append(Finding(kind="disk", severity="warning", says=says, fix=fix, values=values))
        elif inodes.f_files > 0 and inodes.f_favail < INODES_WANTED:
            says = f"{inodes.f_favail} more files can be made at {use} ({folder})"
            found.append(Finding(kind="disk", severity="warning", says=says, fix=fix, values=values))
        else:
            found.append(Finding(kind="disk", severity="ok", says=says, values=values))
    return found


def check_memory(shm: Path = Path("/dev/shm"), *, files: int | None = None) -> list[Finding]:
    """Findings about shared memory and the number of open files. `files`: the limit; None: that of this process."""
    found = []
    try:
        usage = shutil.disk_usage(shm)
        if usage.total < SHM_WANTED:
            says = f"{shm} has {usage.total / 2**20:.0f} MiB: Ray's objects and NCCL's buffers do not fit"
            fix = "Enlarge it (containers: shm_size, `docker run --shm-size=2g`)."
            found.append(Finding(kind="memory", severity="bad", says=says, fix=fix, values={"total": usage.total}))
    except OSError as error:
        fix = "Mount a tmpfs there."
        found.append(Finding(kind="memory", severity="bad", says=f"{shm} cannot be read: {error}", fix=fix))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    if limit != resource.RLIM_INFINITY and limit < FILES_WANTED:
        says = f"Ray's processes may open {limit} files"
        fix = "Raise the limit before Ray starts: `ulimit -n 65536`."
        found.append(Finding(kind="memory", severity="warning", says=says, fix=fix, values={"files": limit}))
    return found or [Finding(kind="memory", severity="ok", says="shared memory and the limit of open files suffice")]
