"""Alembic's environment: migrates the connection in its config, or, for a developer's `alembic` command, the registry."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from tandem.db.database import connect
from tandem.db.schema import Base
from tandem.settings import settings


def migrate(connection: Connection) -> None:
    """Bring the schema up (or down), in the transaction that the connection is in."""
    # SQLite does roll DDL back (Alembic assumes not), as `database.connect` begins transactions explicitly;
    # batch mode is how it alters tables.
    context.configure(
        connection=connection, target_metadata=Base.metadata, transactional_ddl=True, render_as_batch=True
    )
    with context.begin_transaction():
        context.run_migrations()


configured_connection = context.config.attributes.get("connection")
if configured_connection is not None:
    migrate(configured_connection)
else:
    with connect(settings().registry_url).begin() as new_connection:
        migrate(new_connection)
