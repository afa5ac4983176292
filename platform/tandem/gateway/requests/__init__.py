"""Requests: bodies, caps, content checks, hints, byte budget and quarantine."""
