"""Description of the machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
import time
from typing import Any


def machine() -> dict[str, Any]:
    """CPUs, Python version, architecture, load and date."""
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d"),
    }
