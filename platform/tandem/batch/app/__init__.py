"""Batch runs on an app that serves: rows become batches of `/v1/batches`."""
