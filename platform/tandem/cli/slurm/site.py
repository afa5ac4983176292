"""Options that the commands of `tandem slurm` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SiteOption = Annotated[
    Path | None, typer.Option("--site", help="The site's config (YAML); slurm.yaml of TANDEM_HOME where there is one.")
]
SetOption = Annotated[
    list[str], typer.Option("--site-set", metavar="KEY=VALUE", help="Change one value of the site's config.")
]
JobArgument = Annotated[str, typer.Argument(help="Slurm's id of the job, or 'latest'.")]
