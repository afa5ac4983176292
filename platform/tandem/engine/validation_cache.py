"""Cache of validated engine arguments on this node: the next start of the same app need not ask the engine again.

Validation takes seconds, most of them imports. An entry's name is a digest of all that the result depends on: the spec, the
model's config files and the versions of the engine's packages.
"""

from __future__ import annotations

import contextlib
import json
from importlib import metadata
from pathlib import Path

from tandem.engine.engines import find_engine
from tandem.engine.spec import EngineSpec
from tandem.ids import digest, file_digest
from tandem.private import make_private_folder
from tandem.settings import settings
from tandem.storage import write_atomic

CONFIG_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "hf_quant_config.json")
"""Files of a model that an engine's configuration depends on."""


def is_validated(spec: EngineSpec) -> bool:
    """Whether these arguments were valid before, for this model and this version of the engine."""
    return _marker(spec).exists()


def mark_validated(spec: EngineSpec) -> None:
    """Record that these arguments are valid."""
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        marker = _marker(spec)
        make_private_folder(marker.parent)
        write_atomic(marker, "")


def _marker(spec: EngineSpec) -> Path:
    folder, packages = Path(spec.path), find_engine(spec.kind).validation_packages
    values = {name: getattr(spec, name) for name in EngineSpec.__slots__ if name != "where"}
    files = {name: file_digest(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
    versions = [
        (distribution.name, distribution.version)
        for name in packages
        for distribution in metadata.distributions(name=name)
    ]
    name = digest([json.loads(json.dumps(values, default=dict)), files, versions])
    return settings().cache.expanduser() / "engine-args" / name
