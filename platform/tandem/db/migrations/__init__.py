"""Alembic's scripts, run by `db.database` when a registry opens. A new one: `alembic revision --autogenerate`."""
