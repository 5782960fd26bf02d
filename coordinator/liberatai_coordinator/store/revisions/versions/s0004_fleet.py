"""Labels, marks and graves of devices, groups, shadows, events, changes by operators, tokens, rollouts."""

from alembic import op

revision = "4"
down_revision = "3"

_TABLES = (
    """CREATE TABLE device_labels (
        device TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (device, name)) STRICT""",
    """CREATE TABLE device_marks (
        device TEXT NOT NULL, mark TEXT NOT NULL, since_s REAL NOT NULL, reason TEXT NOT NULL,
        PRIMARY KEY (device, mark)) STRICT""",
    """CREATE TABLE tombstones (
        public_key BLOB NOT NULL, device TEXT NOT NULL, reason TEXT NOT NULL, since_s REAL NOT NULL,
        PRIMARY KEY (public_key)) STRICT""",
    """CREATE TABLE device_groups (
        name TEXT NOT NULL, query TEXT NOT NULL, created_s REAL NOT NULL, PRIMARY KEY (name)) STRICT""",
    """CREATE TABLE shadows (
        device TEXT NOT NULL, version INTEGER NOT NULL, desired BLOB NOT NULL, updated_s REAL NOT NULL,
        PRIMARY KEY (device)) STRICT""",
    """CREATE TABLE events (
        number INTEGER NOT NULL, at_s REAL NOT NULL, device TEXT NOT NULL, name TEXT NOT NULL,
        code TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (number)) STRICT""",
    """CREATE TABLE audit (
        number INTEGER NOT NULL, at_s REAL NOT NULL, actor TEXT NOT NULL, role TEXT NOT NULL,
        action TEXT NOT NULL, target TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL,
        PRIMARY KEY (number)) STRICT""",
    """CREATE TABLE tokens (
        name TEXT NOT NULL, role TEXT NOT NULL, sha256 BLOB NOT NULL, created_s REAL NOT NULL,
        expires_s REAL NOT NULL, used_s REAL NOT NULL, PRIMARY KEY (name), UNIQUE (sha256)) STRICT""",
    """CREATE TABLE rollouts (
        name TEXT NOT NULL, spec BLOB NOT NULL, state BLOB NOT NULL, created_s REAL NOT NULL,
        PRIMARY KEY (name)) STRICT""",
    """CREATE TABLE rollout_devices (
        rollout TEXT NOT NULL, device TEXT NOT NULL, state BLOB NOT NULL,
        PRIMARY KEY (rollout, device)) STRICT""",
)


def upgrade() -> None:
    """Add the tables."""
    for statement in _TABLES:
        op.execute(statement)
