"""The scheduler imports neither Ray, nor HTTP, nor the database."""

from __future__ import annotations

import subprocess
import sys

FOREIGN = ("ray", "sqlalchemy", "fastapi", "starlette", "aiohttp", "torch", "yaml")


def test_the_scheduler_loads_neither_ray_nor_http_nor_the_database() -> None:
    code = f"import sys, tandem.jobs.scheduling; print([name for name in {FOREIGN!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
