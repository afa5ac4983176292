"""Free TCP ports of this machine for local clusters and their gateways."""

from __future__ import annotations

import contextlib
import random
import socket

from tandem.errors import ClusterError

PORTS = range(20000, 30000)
"""Range for the ports of local clusters; those above are for gateways on nodes (`node.GATEWAY_PORTS`)."""
GATEWAY_PORTS = range(12000, 20000)
"""Range for the ports of gateways of local clusters."""
BLOCK = 100
"""Number of gateway ports of a local cluster."""


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that are free on loopback now.

    They are below the kernel's range of ephemeral ports, which outgoing connections may take at any moment.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            # As servers do: connections in TIME_WAIT do not block the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(
        f"Fewer than {count} TCP ports from {PORTS.start} to {PORTS.stop - 1} are free on this machine. See `ss -ltn`."
    )


def free_block() -> range:
    """`BLOCK` TCP ports of `GATEWAY_PORTS` in a row that are all free on loopback now."""
    starts = GATEWAY_PORTS[::BLOCK]
    for start in random.SystemRandom().sample(starts, len(starts)):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(start, start + BLOCK):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return range(start, start + BLOCK)
    raise ClusterError(
        f"No {BLOCK} TCP ports in a row from {GATEWAY_PORTS.start} to {GATEWAY_PORTS.stop - 1} are free on this machine. "
        "See `ss -ltn`."
    )
