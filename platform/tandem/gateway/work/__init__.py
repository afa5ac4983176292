"""Durable work at the gateway: services of jobs that routes share."""
