"""Replicas as a gateway sees them: the fleet, suspects, connections."""
