"""Secrets in the environment of replicas: references to them, resolved on the replica's node, and redaction of their values.

A config, Serve's API and Ray's records then hold `env:HF_TOKEN` or `file:/run/secrets/hf` instead of the secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tandem.errors import ConfigError
from tandem.settings import export, variable

SENSITIVE = re.compile(r"(?:^|_)(?:api_?key|key|token|secret|password|passwd|credentials?)(?:_|$)", re.IGNORECASE)
"""Names of variables whose values are secrets."""
SHORTEST = 4
"""Characters of a value that is redacted; shorter ones are parts of other words."""
MAX_FILE_BYTES = 64 * 1024
HIDDEN = "***"


def without_references(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that are given as they are: what Ray may set before the replica's process starts."""
    return {name: value for name, value in env.items() if _target(value) is None}


def resolve_references(env: Mapping[str, str], key: str = "models[].env") -> tuple[str, ...]:
    """Set the variables whose values are `env:NAME` or `file:PATH` to what these hold in this process and on this node.

    Returns the values that must not be shown: those, and the values of variables with names such as HF_TOKEN. ConfigError, with
    `key` and the variable, where there is none.
    """
    hidden = []
    for name, value in env.items():
        kind, target = _target(value) or ("", "")
        if kind == "env":
            resolved = variable(target)
            if not resolved:
                raise ConfigError(
                    f"{key}.{name} is {value}, and {target} is not set on this node. Set it where the node is started."
                )
        elif kind == "file":
            resolved = _read(Path(target), f"{key}.{name} is {value}")
        else:
            if SENSITIVE.search(name):
                hidden.append(value)
            continue
        export({name: resolved}, override=True)
        hidden.append(resolved)
    return tuple(sorted({each for each in hidden if len(each) >= SHORTEST}, key=len, reverse=True))


def referred_value(reference: str, key: str) -> str:
    """What a reference `env:NAME` or `file:PATH` holds in this process and on this node; ConfigError, with `key`, without one."""
    kind, target = _target(reference) or ("", "")
    if kind == "file":
        return _read(Path(target), f"{key} is {reference}")
    value = variable(target) if kind == "env" else None
    if not value:
        raise ConfigError(
            f"{key} is a reference to {target or 'nothing'}, which is not set on this node. Set it where the node is started."
        )
    return value


def redact(text: str, values: Iterable[str]) -> str:
    """A text without secrets: without `values`, and without the passwords in URLs."""
    for value in values:
        text = text.replace(value, HIDDEN)
    return re.sub(r"(\w+://[^\s:/@]*):[^\s@/]+@", rf"\1:{HIDDEN}@", text)


def _target(value: str) -> tuple[str, str] | None:
    """What a reference refers to; None: it is no reference."""
    kind, _, target = value.partition(":")
    return (kind, target) if kind in ("env", "file") and target and not target.startswith("//") else None


def _read(path: Path, what: str) -> str:
    try:
        with path.expanduser().open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{what}, which cannot be read on this node: {reason}.") from None
    if not text:
        raise ConfigError(f"{what}, which is empty.")
    return text
