"""Tandem's work as jobs of a Slurm cluster: batch scripts, submission, the job's folder, tunnels."""
