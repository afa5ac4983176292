"""Dispatch of durable jobs: decisions about what starts, and the loop that starts, watches and stops runs."""
