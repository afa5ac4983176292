"""Folder of compiled kernels: private, below TANDEM_HOME, one for each user and kind of CPU (docs/adr/0022).

Code from these folders is loaded into engines, so nobody else may write there or replace one of them. In a home where others
could, such as one that a group shares, the folder is `~/.cache/tandem/compile` instead. PyTorch's own default is a predictable
name in the shared temporary folder. Kernels are compiled for the CPU that compiles them, and nodes of several kinds may share a
home.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from tandem.errors import EngineError, UnsafePathError, sentence
from tandem.ids import digest
from tandem.private import ensure_private_folder, is_shared, make_shared_folder, replaceable_parent
from tandem.settings import settings, variable

FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
"""Variables that name a folder of compiled code, and the folder that Tandem gives them."""


def compile_cache_environment() -> dict[str, str]:
    """Variables that keep compiled code in this user's cache, without those that the user has set.

    Raises EngineError if that folder cannot be created, or if another user can reach or replace it.
    """
    unset = {name: folder for name, folder in FOLDERS.items() if variable(name) is None}
    if not unset:
        return {}
    try:
        root = _cache_folder()
        environment = {name: str(ensure_private_folder(root / folder)) for name, folder in unset.items()}
    except (OSError, UnsafePathError) as error:
        raise EngineError(
            f"Compiled code cannot be kept: {sentence(str(error))} Set TANDEM_HOME, or each of {', '.join(FOLDERS)}, to a folder "
            "of your own."
        ) from error
    if "TORCHINDUCTOR_CACHE_DIR" in unset and variable("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS") is None:
        # PyTorch keeps precompiled headers in the temporary folder, wherever its cache is. They save no time here.
        environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    return environment


def _cache_folder() -> Path:
    home = settings().root
    shared = home / "cache" / "compile"
    if not is_shared(home) and replaceable_parent(shared.parent) is None:
        make_shared_folder(shared, home)
        folder = shared / f"{os.geteuid()}-{cpu_kind()}"
        if replaceable_parent(folder) is None:
            return ensure_private_folder(folder)
    # Resolved: the links on the way are not followed again.
    return ensure_private_folder(settings().cache.expanduser().resolve() / "compile" / cpu_kind())


def cpu_kind() -> str:
    """The architecture and a digest of the CPU's features: the same for nodes that can run each other's code."""
    machine = platform.machine() or "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return machine
    features = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return f"{machine}-{digest(sorted(features))[:8]}"
