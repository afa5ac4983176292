"""Serve's port between replicas: on the node's address alone, where Ray 2.60 would listen on every interface.

Ray's token guards that port, and no option names its address. A replica opens it when its constructor has returned, by a
function that is replaced here; a Ray without that function listens as it did before.
"""

from __future__ import annotations

from typing import Any

OPEN = "add_port_to_grpc_server"
"""What a replica of Serve opens its port with."""
ALL = "[::]:"
"""What the address starts with where all interfaces are meant."""


def listen_on_node_address() -> None:
    """To be called in the constructor of each deployment."""
    import ray
    from ray.serve._private import replica

    opened = getattr(replica, OPEN, None)
    if opened is None:
        return
    host = ray.util.get_node_ip_address()

    def open_port(server: Any, address: str) -> Any:
        where = f"[{host}]" if ":" in host else host
        return opened(server, f"{where}:{address.removeprefix(ALL)}" if address.startswith(ALL) else address)

    setattr(replica, OPEN, open_port)
