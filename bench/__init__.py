"""Benchmarks: each is a program, `python -m bench.AREA.NAME`."""
