"""A ledger of an older release becomes one of today, step by step, in the transaction that opens it.

The steps are alembic's (`revisions/versions`). The number of a schema is SQLite's `user_version`, which older
programs look at; alembic's own note of it is written with it. Where nothing is to be done alembic is not even
imported.
"""

import logging
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from liberatai_coordinator.store.tables import METADATA, UPDATES_VIEW

SCHEMA_VERSION: Final = 4
"""Of the tables that a program must understand: the number of the last step."""
REVISIONS: Final = Path(__file__).with_name("revisions")
_NOTE: Final = ("CREATE TABLE alembic_version (version_num TEXT NOT NULL PRIMARY KEY)",)


def create(connection: sa.Connection) -> None:
    """Make the tables of today in an empty database."""
    METADATA.create_all(connection)
    connection.exec_driver_sql(UPDATES_VIEW)
    _note(connection, SCHEMA_VERSION)


def upgrade(connection: sa.Connection, version: int) -> None:
    """Go all steps from an older schema to the one of today.

    A killed upgrade leaves the database as it was.

    Args:
        connection: within a transaction, which the caller ends.
        version: of the tables that are there.
    """
    from alembic import command  # noqa: PLC0415 - costs a quarter of a second that nearly no start needs
    from alembic.config import Config  # noqa: PLC0415

    if not sa.inspect(connection).has_table("alembic_version"):
        _note(connection, version)
    # alembic tells every step that it takes; who opened the ledger says it in one line
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(REVISIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, str(SCHEMA_VERSION))


def _note(connection: sa.Connection, version: int) -> None:
    for statement in _NOTE:
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (str(version),))
