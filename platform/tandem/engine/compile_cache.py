"""Where compiled kernels are kept: a private folder below TANDEM_HOME, one for each user and kind of CPU (docs/adr/0022).

Code from these folders is loaded into engines, so nobody else may write there; PyTorch's own default is a predictable name in the
shared temporary folder. Kernels are compiled for the CPU that compiles them, and nodes of several kinds may share a home.
"""

from __future__ import annotations

import os
import platform
import stat
from pathlib import Path

from tandem.errors import EngineError
from tandem.ids import digest
from tandem.settings import settings, variable

FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
"""Variables that name a folder of compiled code, and the folder that Tandem gives them."""


def compile_cache_environment() -> dict[str, str]:
    """Variables that keep compiled code in this user's cache below TANDEM_HOME, without those that the user has set.

    Raises EngineError if that folder cannot be made or belongs to somebody else.
    """
    unset = {name: folder for name, folder in FOLDERS.items() if variable(name) is None}
    if not unset:
        return {}
    root = private_folder(settings().root / "cache" / "compile" / f"{os.getuid()}-{cpu_kind()}")
    environment = {name: str(private_folder(root / folder)) for name, folder in unset.items()}
    if "TORCHINDUCTOR_CACHE_DIR" in unset and variable("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS") is None:
        # PyTorch keeps precompiled headers in the temporary folder, wherever its cache is. They save no time here.
        environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    return environment


def private_folder(path: Path) -> Path:
    """The folder, made if needed, which belongs to this user and which nobody else may enter. Raises EngineError."""
    advice = f"Set TANDEM_HOME, or each of {', '.join(FOLDERS)}, to a folder of your own."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise EngineError(
                f"{path} is no folder of this user (it belongs to uid {found.st_uid}), so compiled code cannot be kept there. "
                + advice
            )
        if found.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise EngineError(f"Compiled code cannot be kept in {path}: {error}. {advice}") from error
    return path


def cpu_kind() -> str:
    """The architecture and a digest of the CPU's features: the same for nodes that can run each other's code."""
    machine = platform.machine() or "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return machine
    features = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return f"{machine}-{digest(sorted(features))[:8]}"
