"""Benchmarks of serving: latency, throughput, overload, faults, adapters and batch inference."""
