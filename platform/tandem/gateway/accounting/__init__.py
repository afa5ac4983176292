"""Accounting of requests: limits of keys and tenants, usage, and the access log."""
