"""Durable work: jobs of every kind, queue items and their events in the database, with leases and fencing tokens."""
