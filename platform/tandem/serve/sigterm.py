"""SIGTERM to a replica's process: Serve is asked to replace it and lets it drain, where Ray would cut its streams.

Ray's worker has a handler for the signal that ends the process; only the main thread could set another, and no code of ours
runs there. The handler's last step is a function of Ray's module, which is replaced. A Ray without it ends as it did before.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

STEP = "raise_sys_exit_with_custom_error_message"
"""What Ray's handler calls to end the process."""
LOOK_S = 0.2


class AskedToEnd:
    """Whether this process has had a SIGTERM; hears of it from when it is made."""

    def __init__(self, asked: Callable[[], None] = lambda: None) -> None:
        """`asked` is called in the main thread, once; it must not raise."""
        self.asked = False
        self._tell = asked
        from ray._private import worker

        if hasattr(worker, STEP):
            setattr(worker, STEP, self._step)

    def _step(self, *args: Any, **options: Any) -> None:
        if self.asked:
            return
        self.asked = True
        threading.Thread(target=_end_with_the_node, args=(os.getppid(),), daemon=True).start()
        self._tell()


def _end_with_the_node(parent: int) -> None:
    """Where the whole node ends, nobody is left to replace this replica."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
