"""SIGTERM handling of a replica: drains as when Serve stops it, where Ray would cut its streams.

Ray's worker has a handler for the signal that ends the process; only the main thread could set another, and no code of ours
runs there. The handler's last step is a function of Ray's module, which is replaced. A Ray without it ends as it did before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from tandem.settings import LONGEST_DRAIN_S

EXIT_FUNCTION = "raise_sys_exit_with_custom_error_message"
"""Function that Ray's handler calls to end the process."""
CHECK_INTERVAL_S = 0.2


def drain_on_sigterm() -> None:
    """Call once in a Serve replica: a SIGTERM then lets its streams end, within Serve's own limits.

    A gateway leaves HAProxy's list and closes its listener; an engine tells the gateways. Serve replaces what has ended.
    """
    import ray
    from ray import serve
    from ray._private import worker

    name = serve.get_replica_context().replica_id.to_full_id_str()
    has_begun = threading.Event()

    def start_drain(*args: Any, **options: Any) -> None:
        # Runs in the main thread, which must not block.
        if not has_begun.is_set():
            has_begun.set()
            threading.Thread(target=_end_with_the_node, args=(os.getppid(),), daemon=True).start()
            threading.Thread(target=drain, daemon=True).start()

    def drain() -> None:
        with contextlib.suppress(Exception):
            replica = ray.get_actor(name, namespace="serve")
            ray.get(replica.perform_graceful_shutdown.remote(), timeout=LONGEST_DRAIN_S)
        os._exit(0)

    if hasattr(worker, EXIT_FUNCTION):
        setattr(worker, EXIT_FUNCTION, start_drain)


def _end_with_the_node(parent: int) -> None:
    """End the process with its node: no client is left."""
    while os.getppid() == parent:
        time.sleep(CHECK_INTERVAL_S)
    os._exit(1)
