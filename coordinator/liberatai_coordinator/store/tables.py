"""The tables of the ledger; no SQLite-only type or statement, so that PostgreSQL can take its place."""

from typing import Any

import sqlalchemy as sa

METADATA = sa.MetaData()
# STRICT tables know INTEGER, REAL, TEXT and BLOB only; PostgreSQL needs the 64-bit names.
_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REAL: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
_STRICT: dict[str, Any] = {"sqlite_strict": True}


def _text(name: str, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, **more)


def _whole(name: str, **more: Any) -> sa.Column[int]:
    return sa.Column(name, _INTEGER, nullable=False, **more)


def _blob(name: str, *, nullable: bool = False, **more: Any) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary, nullable=nullable, **more)


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
    **_STRICT,
)
JOB_VALUES = sa.Table(
    "job_values",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.name"), primary_key=True),
    _text("key", primary_key=True),
    _blob("value"),
    **_STRICT,
)
ROUNDS = sa.Table(
    "rounds",
    METADATA,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.name"), primary_key=True),
    _whole("round", primary_key=True),
    _whole("epoch"),
    _text("state"),
    _text("reason"),
    _seconds("opened_s"),
    _blob("invited"),
    _blob("frozen"),
    _blob("frozen_sha256"),
    _text("version_id"),
    _blob("stats"),
    **_STRICT,
)
UPDATES = sa.Table(
    "updates",
    METADATA,
    _blob("update_id", primary_key=True),
    _text("job"),
    _whole("round"),
    _text("device"),
    _text("structure"),
    _whole("samples"),
    _blob("sha256"),
    _blob("frame", nullable=True),
    _seconds("received_s"),
    sa.UniqueConstraint("job", "round", "device"),
    sa.ForeignKeyConstraint(["job", "round"], ["rounds.job", "rounds.round"]),
    **_STRICT,
)
VERSIONS = sa.Table(
    "versions",
    METADATA,
    _text("model", primary_key=True),
    _whole("number", primary_key=True),
    _text("id"),
    sa.Column("parent", sa.Text),
    _blob("manifest"),
    _seconds("created_s"),
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
