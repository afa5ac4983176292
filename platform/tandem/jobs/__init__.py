"""Durable work of every kind: states, store, dispatcher, scheduler and runners; training jobs and sweeps."""
