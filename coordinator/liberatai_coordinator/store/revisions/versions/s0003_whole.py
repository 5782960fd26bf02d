"""What came to the second schema without a number: every ledger of it has the same tables from here on.

Tables were added as they were needed (variants, paths, traffic, refusals), a column of jobs came and went,
and for a while manifests were compressed.
"""

import zlib
from pathlib import Path
from typing import Final

from alembic import op

revision = "3"
down_revision = "2"

_TABLES: Final = Path(__file__).parents[1] / "schema_2.sql"
_MARK: Final = b"\0zlib\0"


def upgrade() -> None:
    """Add what is missing, remove what is too much."""
    connection = op.get_bind()
    for statement in _TABLES.read_text().split(";"):
        if statement.strip():
            connection.exec_driver_sql(statement)
    columns = connection.exec_driver_sql("SELECT name FROM pragma_table_info('jobs')").scalars().all()
    if "run" in columns:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN run")
    packed = "SELECT rowid, manifest FROM {0} WHERE substr(manifest, 1, 6) = ?"
    unpacked = "UPDATE {0} SET manifest = ? WHERE rowid = ?"
    for table in ("versions", "variants"):
        rows = connection.exec_driver_sql(packed.format(table), (_MARK,)).all()
        for row, manifest in rows:
            plain = zlib.decompress(manifest[len(_MARK) :])
            connection.exec_driver_sql(unpacked.format(table), (plain, row))
