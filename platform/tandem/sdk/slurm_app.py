"""The app of a Slurm job, asked on its own node: whether its listener is this user's, whether it is ready, its models.

Nodes may be shared, and the job's key is sent in clear: it goes to a listener of this user alone, and never through a proxy.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from tandem.errors import ClusterError

LISTENERS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The kernel's tables of sockets, of this network namespace."""
LISTEN_STATE = "0A"
ANSWER_S = 5.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check_port_free(host: str, port: int) -> None:
    """ClusterError if something listens on the app's port already: it would get the requests and keys of the app's users."""
    with socket.socket() as probe:
        # As servers do: connections in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"Port {port} of {host} cannot be taken for the app ({error.strerror}). Choose another one with --port, or ask "
                "for whole nodes (--exclusive)."
            ) from error


def listener_owners(port: int, tables: Iterable[Path] = LISTENERS) -> set[int]:
    """User ids of the sockets that listen on a port, on any address; empty where the kernel does not tell."""
    owners = set()
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            # sl local_address rem_address st tx:rx tr:when retrnsmt uid ...
            fields = line.split()
            if fields[3] == LISTEN_STATE and int(fields[1].rpartition(":")[2], 16) == port:
                owners.add(int(fields[7]))
    return owners


def is_ready(host: str, port: int) -> bool:
    """Whether a listener of this user answers as Tandem does, is ready on all its models, and refuses requests without a key."""
    if listener_owners(port) != {os.geteuid()}:
        return False
    try:
        with DIRECT.open(f"http://{host}:{port}/health/ready", timeout=ANSWER_S) as answer:
            if answer.status != 200:
                return False
        with DIRECT.open(f"http://{host}:{port}/v1/models", timeout=ANSWER_S):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 401 and error.headers.get("WWW-Authenticate", "").startswith("Bearer")
    except (OSError, ValueError, http.client.HTTPException):
        return False


def models(host: str, port: int, key: str) -> tuple[str, ...] | None:
    """The names of its models; None where it does not answer, or not yet as it should."""
    request = urllib.request.Request(f"http://{host}:{port}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with DIRECT.open(request, timeout=2 * ANSWER_S) as answer:
            return tuple(str(model["id"]) for model in json.load(answer)["data"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return None
