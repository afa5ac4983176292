"""Config of training jobs and sweeps."""
