"""Database of all durable state: connections, schema and migrations."""
