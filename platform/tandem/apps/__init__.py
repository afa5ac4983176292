"""Composition of a Serve application: directory, engine replicas and gateway."""
