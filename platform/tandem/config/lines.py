"""Line numbers in errors about keys of a YAML file. Messages name keys as `models[0].engine_args.dtype`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from tandem.errors import ConfigError

KEY = re.compile(r"[A-Za-z_][\w-]*(\[\d+\])?(\.[\w-]+(\[\d+\])?)*")


@contextlib.contextmanager
def located(path: Path | None, overridden: Iterable[str] = ()) -> Iterator[None]:
    """Put `FILE line N: ` before a ConfigError raised in the `with` block, if its message begins with a key of the file.

    `overridden` (`a.b=c`) did not come from the file.
    """
    try:
        yield
    except ConfigError as error:
        match = KEY.match(str(error))
        is_overridden = match and any(
            f"{match.group()}.".startswith(f"{o.partition('=')[0].strip()}.") for o in overridden
        )
        line = line_of(path, match.group()) if path is not None and match and not is_overridden else None
        if line is None:
            raise
        raise ConfigError(f"{path} line {line}: {error}") from error


def line_of(path: Path, key: str) -> int | None:
    """The line (from 1) of a dotted key, or None if the file lacks it: it came from elsewhere."""
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    line = None
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                return None
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            return None
    return line
