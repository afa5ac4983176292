"""Options that the commands of `tandem slurm` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.config.load import apply_overrides, from_dict, read_yaml
from tandem.config.slurm import SlurmSite
from tandem.settings import settings

SiteOption = Annotated[
    Path | None, typer.Option("--site", help="The site's config (YAML); slurm.yaml of TANDEM_HOME where there is one.")
]
SetOption = Annotated[
    list[str], typer.Option("--site-set", metavar="KEY=VALUE", help="Change one value of the site's config.")
]
JobArgument = Annotated[str, typer.Argument(help="Slurm's id of the job, or 'latest'.")]


def read_site(path: Path | None, overrides: list[str]) -> SlurmSite:
    """The site's config; ConfigError if a file that was named is not there."""
    own = settings().root / "slurm.yaml"
    values: dict[str, Any] = read_yaml(path) if path is not None else read_yaml(own) if own.exists() else {}
    return from_dict(SlurmSite, apply_overrides(values, overrides))
