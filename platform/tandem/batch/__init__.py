"""Batch inference: rows read by Ray Data, answered by engines, and published in chunks."""
