"""Clients of the native job routes of a served app, for threads and for event loops."""
