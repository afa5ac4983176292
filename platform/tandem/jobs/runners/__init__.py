"""Runners: where the dispatcher's jobs run (processes of this machine, Ray Jobs, Slurm)."""
