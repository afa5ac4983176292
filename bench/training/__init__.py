"""Benchmarks of training: overhead, layouts, data, checkpoints and faults."""
