"""Shared by the benchmarks: load generators, tables and bars."""
