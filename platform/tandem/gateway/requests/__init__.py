"""Requests: their bodies, caps, contents and hints, and what a gateway remembers of them."""
