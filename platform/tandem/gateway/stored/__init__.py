"""Storing of answers at a gateway: copies of what clients get, written to the database in the background."""
