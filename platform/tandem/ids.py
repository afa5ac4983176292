"""Identifiers: content digests, job ids, and the rules for names. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
FINE_TUNED_PATTERN = re.compile(r"ft(:[A-Za-z0-9._-]*){1,4}")
"""Names that the fine-tuning API gives: `ft:BASE:TENANT:SUFFIX:ID`."""
NAME_LENGTH = 96
HUB_NAME_PATTERN = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?/[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
HUB_NAME_LENGTH = 96


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, the same whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def fingerprint(secret: str | None) -> str | None:
    """sha256 (hex) of a secret, by which it is known again and which may be kept; None for none."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest() if secret else None


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """sha256 (hex) over the relative names and contents of every file below `folder`.

    `known`: sha256 (hex) of files by relative name, which are then not read.
    """
    known = known or {}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return digest([[name, known.get(name) or file_digest(folder / name)] for name in names])


def job_id(name: str, content: Any) -> str:
    """`name-<12 hex>`: the same submission has the same id, whatever order its keys were written in."""
    return f"{check_name(name).replace(':', '-')}-{digest(content)[:12]}"


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it can be a model, adapter or job name; raise ConfigError otherwise."""
    if not NAME_PATTERN.fullmatch(name) and not (FINE_TUNED_PATTERN.fullmatch(name) and len(name) <= NAME_LENGTH):
        raise ConfigError(
            f"{what} {name!r} cannot be used: 1 to 96 letters, digits, '.', '_' or '-', the first a letter or digit."
        )
    return name


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a repository of the Hugging Face hub, `org/name`, by the hub's own rules."""
    return (
        len(name) <= HUB_NAME_LENGTH
        and bool(HUB_NAME_PATTERN.fullmatch(name))
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def versioned(name: str, version: int) -> str:
    """`name@version`, the id of one version of a model or adapter."""
    return f"{name}@{version}"


def split_version(name: str) -> tuple[str, int | None]:
    """`("name", 3)` for `name@3`, `("name", None)` for `name`."""
    stem, at, version = name.rpartition("@")
    if at and re.fullmatch("[0-9]{1,9}", version):
        return stem, int(version)
    return name, None
