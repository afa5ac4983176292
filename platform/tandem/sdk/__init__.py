"""Python API: clients of a served app."""
