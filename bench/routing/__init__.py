"""Benchmarks of routing: simulated and real replicas."""
