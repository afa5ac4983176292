"""Alembic's scripts, run by `registry.database` when a registry opens. A new one: `alembic revision --autogenerate`."""
