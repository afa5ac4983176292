"""Reports of a training run: metrics, plots, and model FLOPs utilization."""
