"""The site's config, `slurm.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.config.load import apply_overrides, from_dict, read_yaml
from tandem.config.slurm import SlurmSite
from tandem.settings import settings


def read_site(path: Path | None = None, overrides: Sequence[str] = ()) -> SlurmSite:
    """The site's config: of the file, else of slurm.yaml in TANDEM_HOME, else all defaults.

    ConfigError if a file that was named is not there.
    """
    return from_dict(SlurmSite, site_values(path, overrides))


def site_values(path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as it was written, not checked."""
    own = settings().root / "slurm.yaml"
    values: dict[str, Any] = read_yaml(path) if path is not None else read_yaml(own) if own.exists() else {}
    return apply_overrides(values, overrides)
