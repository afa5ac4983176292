"""Slots of a machine: each node that does not serve holds one, and with it a range of worker ports."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tandem.cluster.node import SLOTS, worker_ports
from tandem.errors import ClusterError
from tandem.private import ensure_private_folder


def slots_folder() -> Path:
    """The private folder with this user's lock files. It is the machine's: jobs have runtime folders of their own."""
    return Path(f"/tmp/tandem-{os.getuid()}/slots")


@contextlib.contextmanager
def hold_slot(preferred: int) -> Iterator[int]:
    """A slot for the length of a block: the preferred one (modulo SLOTS), or the next whose lock and ports are free.

    The lock keeps this user's nodes apart. Those of others, whose locks are not seen, are noticed by ports that are in use; other
    numbers of jobs prefer other slots. ClusterError if there is none.
    """
    folder = ensure_private_folder(slots_folder())
    for number in range(preferred, preferred + SLOTS):
        slot = number % SLOTS
        # Closed, and so released, whenever this process ends; its children do not have it.
        with (folder / f"{slot}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if _are_free(worker_ports(slot)):
                yield slot
                return
    raise ClusterError(
        f"None of the {SLOTS} slots for nodes of Tandem is free on {socket.gethostname()}: each has a node, or a program that "
        "listens on one of its ports (`ss -ltn`). Ask for whole nodes (--exclusive), or for fewer jobs at a time."
    )


def _are_free(ports: range) -> bool:
    """Whether nothing listens on any of these ports."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True
