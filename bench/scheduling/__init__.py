"""Benchmarks of scheduling: training jobs and serving on one cluster, simulated."""
