"""The tables of the ledger; no SQLite-only type or statement, so that PostgreSQL can take its place."""

import zlib
from typing import Any, Final

import sqlalchemy as sa

METADATA = sa.MetaData()
# STRICT tables know INTEGER, REAL, TEXT and BLOB only; PostgreSQL needs the 64-bit names.
_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REAL: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
_STRICT: dict[str, Any] = {"sqlite_strict": True}


class _Blob(sa.LargeBinary):
    """Bytes as they are: both drivers take and give them, and the wrapping of every value costs time."""

    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> None:  # noqa: ARG002 - SQLAlchemy's
        return None

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> None:  # noqa: ARG002 - SQLAlchemy's
        return None


def _text(name: str, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, **more)


def _whole(name: str, **more: Any) -> sa.Column[int]:
    return sa.Column(name, _INTEGER, nullable=False, **more)


def _blob(name: str, *, nullable: bool = False, **more: Any) -> sa.Column[bytes]:
    return sa.Column(name, _Blob(), nullable=nullable, **more)


PACKED_BYTES: Final = 1024
"""Shorter values are kept as they are."""
_MARK: Final = b"\0zlib\0"


class Packed(sa.types.TypeDecorator[bytes]):
    """Long records that repeat themselves: a plan says the same of many devices."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: bytes | None, dialect: sa.Dialect) -> bytes | None:  # noqa: ARG002
        """Compress what is long; what others wrote as it is stays readable."""
        if value is None or (len(value) < PACKED_BYTES and not value.startswith(_MARK)):
            return value
        return _MARK + zlib.compress(value, 1)

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> bytes | None:  # noqa: ARG002
        """Return the value as it was given."""
        marked = value is not None and value.startswith(_MARK)
        return zlib.decompress(value[len(_MARK) :]) if value is not None and marked else value


def _packed(name: str) -> sa.Column[bytes]:
    return sa.Column(name, Packed, nullable=False)


def _seconds(name: str) -> sa.Column[float]:
    return sa.Column(name, _REAL, nullable=False)


META = sa.Table("meta", METADATA, _text("key", primary_key=True), _whole("value"), **_STRICT)
DEVICES = sa.Table(
    "devices",
    METADATA,
    _text("id", primary_key=True),
    _blob("public_key"),
    _text("status"),
    _text("reason"),
    _blob("capability", nullable=True),
    _whole("session"),
    _seconds("first_seen_s"),
    _seconds("last_seen_s"),
    **_STRICT,
)
JOBS = sa.Table(
    "jobs",
    METADATA,
    _text("name", primary_key=True),
    _blob("spec"),
    _text("base_dir"),
    _text("state"),
    _text("reason"),
    _seconds("created_s"),
    _whole("first_version", server_default="0"),
    **_STRICT,
)
JOB_VALUES = sa.Table(
    "job_values",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.name"), primary_key=True),
    _text("key", primary_key=True),
    _packed("value"),
    **_STRICT,
)
ROUNDS = sa.Table(
    "rounds",
    METADATA,
    # What is long comes last: reading the rest of a row does not touch it.
    _whole("no", primary_key=True),
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.name"), nullable=False),
    _whole("round"),
    _whole("epoch"),
    _text("state"),
    _text("reason"),
    _seconds("opened_s"),
    _whole("asked"),
    _whole("updates"),
    _whole("pruned", server_default="0"),
    _text("version_id"),
    _blob("frozen_sha256"),
    _blob("stats"),
    _blob("frozen"),
    _blob("invited"),
    _blob("details"),
    sa.UniqueConstraint("job", "round"),
    **_STRICT,
)
SENDERS = sa.Table(
    "senders",
    METADATA,
    _whole("no", primary_key=True),
    _text("device", unique=True),
    _whole("updates"),
    **_STRICT,
)
SLOT_BITS = 24
"""A slot is the number of a round, and in this many bits that of a sender. There is one update in each slot,
and those of a round lie together."""
UPDATE_KEYS = sa.Table(
    "update_keys",
    METADATA,
    _whole("slot", primary_key=True),
    _blob("update_id", unique=True),
    **_STRICT,
)
UPDATE_FRAMES = sa.Table(
    "update_frames",
    METADATA,
    _whole("slot", primary_key=True),
    _text("structure"),
    _whole("samples"),
    _seconds("received_s"),
    _blob("sha256"),
    _blob("frame"),
    **_STRICT,
)
UPDATES_VIEW = """
CREATE VIEW IF NOT EXISTS updates AS
SELECT update_id, job, round, device, structure, samples, sha256, frame, received_s
FROM update_keys
JOIN rounds ON rounds.no = update_keys.slot >> 24
JOIN senders ON senders.no = update_keys.slot & 16777215
LEFT JOIN update_frames ON update_frames.slot = update_keys.slot
"""
"""For people who look into the file; the program reads the tables."""
VERSIONS = sa.Table(
    "versions",
    METADATA,
    _text("model", primary_key=True),
    _whole("number", primary_key=True),
    _text("id"),
    sa.Column("parent", sa.Text),
    _blob("manifest"),
    _seconds("created_s"),
    _whole("collected", server_default="0"),
    sa.UniqueConstraint("model", "id"),
    **_STRICT,
)
TAGS = sa.Table(
    "tags",
    METADATA,
    _text("model", primary_key=True),
    _text("tag", primary_key=True),
    _whole("number"),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    **_STRICT,
)
VARIANTS = sa.Table(
    "variants",
    METADATA,
    _text("model", primary_key=True),
    _text("id", primary_key=True),
    _whole("number"),
    _text("structure"),
    _whole("size_bytes"),
    _blob("manifest"),
    _seconds("created_s"),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    **_STRICT,
)
REFUSALS = sa.Table(
    "refusals",
    METADATA,
    _text("device", primary_key=True),
    _text("code", primary_key=True),
    _whole("count"),
    **_STRICT,
)
TRAFFIC = sa.Table(
    "traffic",
    METADATA,
    _text("device", primary_key=True),
    _whole("sent_bytes"),
    _whole("received_bytes"),
    _whole("session"),
    _whole("session_sent"),
    _whole("session_received"),
    **_STRICT,
)
PATHS = sa.Table(
    "paths",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.name"), primary_key=True),
    _text("device", primary_key=True),
    _blob("path"),
    **_STRICT,
)
DEVICE_LABELS = sa.Table(
    "device_labels",
    METADATA,
    _text("device", primary_key=True),
    _text("name", primary_key=True),
    _text("value"),
    **_STRICT,
)
DEVICE_MARKS = sa.Table(
    "device_marks",
    METADATA,
    _text("device", primary_key=True),
    _text("mark", primary_key=True),
    _seconds("since_s"),
    _text("reason"),
    **_STRICT,
)
TOMBSTONES = sa.Table(
    "tombstones",
    METADATA,
    _blob("public_key", primary_key=True),
    _text("device"),
    _text("reason"),
    _seconds("since_s"),
    **_STRICT,
)
GROUPS = sa.Table(
    "device_groups",
    METADATA,
    _text("name", primary_key=True),
    _text("query"),
    _seconds("created_s"),
    **_STRICT,
)
SHADOWS = sa.Table(
    "shadows",
    METADATA,
    _text("device", primary_key=True),
    _whole("version"),
    _blob("desired"),
    _seconds("updated_s"),
    **_STRICT,
)
EVENTS = sa.Table(
    "events",
    METADATA,
    _whole("number", primary_key=True),
    _seconds("at_s"),
    _text("device"),
    _text("name"),
    _text("code"),
    _text("text"),
    **_STRICT,
)
AUDIT = sa.Table(
    "audit",
    METADATA,
    _whole("number", primary_key=True),
    _seconds("at_s"),
    _text("actor"),
    _text("role"),
    _text("action"),
    _text("target"),
    _text("code"),
    _text("detail"),
    **_STRICT,
)
TOKENS = sa.Table(
    "tokens",
    METADATA,
    _text("name", primary_key=True),
    _text("role"),
    _blob("sha256", unique=True),
    _seconds("created_s"),
    _seconds("expires_s"),
    _seconds("used_s"),
    **_STRICT,
)
ROLLOUTS = sa.Table(
    "rollouts",
    METADATA,
    _text("name", primary_key=True),
    _blob("spec"),
    _blob("state"),
    _seconds("created_s"),
    **_STRICT,
)
ROLLOUT_DEVICES = sa.Table(
    "rollout_devices",
    METADATA,
    _text("rollout", primary_key=True),
    _text("device", primary_key=True),
    _blob("state"),
    **_STRICT,
)
