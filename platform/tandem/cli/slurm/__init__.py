"""`tandem slurm`."""

from tandem.cli.slurm.jobs import slurm_app

__all__ = ["slurm_app"]
