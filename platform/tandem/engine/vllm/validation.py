"""Validation of vLLM's arguments in a process of its own, so that this one does not import vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tandem import settings
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.environment import engine_environment
from tandem.errors import EngineError

VALIDATION_TIMEOUT_S = 180.0


def validate(specs: Sequence[EngineSpec]) -> list[str | None]:
    """The error in each spec's arguments, None if there is none; EngineError if vLLM cannot be asked."""
    if not specs:
        return []
    values = json.dumps([{name: getattr(spec, name) for name in EngineSpec.__slots__} for spec in specs], default=dict)
    try:
        # vLLM leaves files in the temporary folder, and executes some.
        with tempfile.TemporaryDirectory(prefix="tandem-", ignore_cleanup_errors=True) as temporary:
            process = subprocess.run(
                [sys.executable, "-m", "tandem.engine.vllm.arguments"],
                input=values,
                capture_output=True,
                text=True,
                timeout=VALIDATION_TIMEOUT_S,
                env=settings.child_environment({**engine_environment(specs[0]), "TMPDIR": temporary}),
            )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"vLLM did not check engine_args within {VALIDATION_TIMEOUT_S:.0f} s.") from error
    last_line = process.stdout.strip().rpartition("\n")[2]
    if process.returncode or not last_line:
        raise EngineError(f"vLLM could not check engine_args: {process.stderr.strip()[-2000:]}")
    errors: list[str | None] = json.loads(last_line)
    return errors
