"""The output of a replica's process while its engine starts: quoted in the error of a start that failed, and kept.

Ray's own log files end with a local cluster, so a copy is kept in TANDEM_HOME/logs.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import ray

from tandem.engine.descriptor import EngineDescriptor
from tandem.errors import EngineError, StorageError
from tandem.private import make_shared_folder
from tandem.secret_values import redact
from tandem.settings import settings
from tandem.storage import write_atomic

MAX_BYTES = 2**20
"""The end of each file that is read and kept."""


class StartLog:
    """Output of this process and its children since this object was made."""

    def __init__(self, name: str, engine: EngineDescriptor, secrets: tuple[str, ...] = ()) -> None:
        """`name` is the file's in TANDEM_HOME/logs; `secrets` are left out of errors and of the file."""
        self._secrets = secrets
        self._name = name
        self._engine = engine
        self._files = [(path, path.stat().st_size) for path in _ray_log_files()]

    def with_engine_output(self, error: EngineError) -> EngineError:
        """The same error with the engine's own last error, and with the path of the log."""
        output = redact("".join(_read_from(path, start) for path, start in self._files), self._secrets)
        message = self._engine.explain_start_error(redact(str(error), self._secrets), output)
        return EngineError(f"{message.rstrip('. ')}. {self._save(output)}")

    def _save(self, output: str) -> str:
        node = socket.gethostname()
        home = settings().root
        path = home / "logs" / f"{self._name}.log"
        try:
            make_shared_folder(path.parent, home)
            write_atomic(path, output, mode=0o600)
        except (OSError, StorageError):
            if not self._files:
                return f"Its log is not on the node {node}."
            path = self._files[0][0]
        return f"Its log is {path} on the node {node}."


def _ray_log_files() -> list[Path]:
    """The files that Ray gave this process for stderr and stdout; none outside a worker of Ray's."""
    worker: Any = ray._private.worker.global_worker
    paths = (Path(path) for path in (worker.get_err_file_path(), worker.get_out_file_path()) if path)
    return list(dict.fromkeys(path for path in paths if path.is_file()))


def _read_from(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - MAX_BYTES))
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""
