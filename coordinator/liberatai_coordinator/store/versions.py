"""Versions of models, their tags and their variants. A version exists once its row is here (promise P3)."""

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.manifests import decode_manifest, decode_variant
from liberatai_coordinator.store.rows import VariantRow, VersionRow
from liberatai_coordinator.store.tables import TAGS, VARIANTS, VERSIONS
from liberatai_core.errors import DigestError, NotFoundError, SchemaError
from liberatai_core.spelling import meant

_NUMBER: Final = re.compile("[0-9]{1,10}")


class VersionStore:
    """Versions by model and number, variants by model and id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, version: VersionRow) -> None:
        """Add a version; adding the same again is fine.

        Raises:
            DigestError: the id is not the SHA-256 of the manifest, or the number or the parent is
                another version's.
        """
        if hashlib.sha256(version.manifest).hexdigest() != version.id:
            raise DigestError(f"{version.model} version {version.number}: id and manifest do not match")
        model, number = version.model, version.number
        same = sa.or_(VERSIONS.c.number == number, VERSIONS.c.id == version.id)
        with self._database.write() as connection:
            known = connection.execute(_keys(model).where(same)).all()
            if [(number, version.id)] == [(row.number, row.id) for row in known]:
                return
            if known:
                raise DigestError(f"{model} version {number}: another version has this number or this id")
            parent = _keys(model).where(VERSIONS.c.id == version.parent)
            if version.parent is not None and connection.execute(parent).first() is None:
                raise DigestError(f"{model} version {number}: its parent {version.parent[:12]} is not stored")
            values = columns_of(version) | {"collected": int(version.collected)}
            del values["tags"]
            connection.execute(sa.insert(VERSIONS), [values])
            _set_tags(connection, version.model, dict.fromkeys(version.tags, number))

    def set_tag(self, model: str, tag: str, number: int) -> None:
        """Let a tag name this version; it names no other any more.

        Raises:
            NotFoundError: no such version, or its files are gone.
            SchemaError: the tag could be taken for a number, or for "latest".
        """
        with self._database.write() as connection:
            row = connection.execute(_keys(model).where(VERSIONS.c.number == number)).first()
            if row is None:
                raise NotFoundError(f"model {model}: no version {number}")
            require_files(model, number, collected=bool(row.collected))
            _set_tags(connection, model, {tag: number})

    def all(self, model: str, *, first: int = 0) -> list[VersionRow]:
        """Return the versions of a model from this number on, oldest first; [] if there is no such model."""
        with self._database.read() as connection:
            return _version_rows(connection, model, VERSIONS.c.number >= first)

    def newest(self, model: str, *, first: int = 0) -> VersionRow | None:
        """Return the newest version of a model; None if there is none from this number on."""
        newest = sa.select(sa.func.max(VERSIONS.c.number)).where(VERSIONS.c.model == model)
        condition = sa.and_(VERSIONS.c.number == newest.scalar_subquery(), VERSIONS.c.number >= first)
        with self._database.read() as connection:
            return next(iter(_version_rows(connection, model, condition)), None)

    def get(self, model: str, ref: int | str = "latest") -> VersionRow:
        """Return one version by number, tag, full id, or "latest".

        Raises:
            NotFoundError: no such model or version.
        """
        newest = self.newest(model)
        if newest is None:
            raise NotFoundError(f"model {model}: not known (see `liberatai models list`)")
        if ref == "latest":
            return newest
        text = str(ref)
        tagged = sa.select(TAGS.c.number).where(TAGS.c.model == model, TAGS.c.tag == text).scalar_subquery()
        conditions = [VERSIONS.c.number == tagged, VERSIONS.c.id == text]
        if _NUMBER.fullmatch(text):
            conditions.append(VERSIONS.c.number == int(text))
        with self._database.read() as connection:
            rows = _version_rows(connection, model, sa.or_(*conditions))
        if not rows:
            tags = sa.select(TAGS.c.tag).where(TAGS.c.model == model)
            with self._database.read() as connection:
                known = [row.tag for row in connection.execute(tags)]
            raise NotFoundError(
                f"model {model}: no version {text[:64]!r} (see `liberatai models log {model}`)"
                f"{meant(text[:64], [*known, 'latest'])}"
            )
        return rows[0]

    def collectable(self, model: str) -> list[int]:
        """Return the versions whose files may go, oldest first: no tag, no variant, not a job's first one."""
        query = _keys(model).where(
            VERSIONS.c.collected == 0, VERSIONS.c.parent.is_not(None), VERSIONS.c.number.not_in(_named(model))
        )
        with self._database.read() as connection:
            return [row.number for row in connection.execute(query.order_by(VERSIONS.c.number))]

    def set_collected(self, model: str, numbers: Collection[int]) -> None:
        """Say that the files of these versions are about to be removed. What they were stays known.

        Versions with a tag or a variant keep their files, whatever the caller believes.
        """
        change = sa.update(VERSIONS).where(
            VERSIONS.c.model == model,
            VERSIONS.c.number.in_(numbers),
            VERSIONS.c.number.not_in(_named(model)),
        )
        with self._database.write() as connection:
            connection.execute(change.values(collected=1))

    def needed_blobs(self) -> set[str]:
        """Return the SHA-256 of every blob that a version or a variant of any model needs."""
        needed: set[str] = set()
        versions = sa.select(VERSIONS.c.id, VERSIONS.c.manifest).where(VERSIONS.c.collected == 0)
        with self._database.read() as connection:
            for sha, content in connection.execute(versions):
                needed |= {sha} | decode_manifest(content).blobs
            for sha, content in connection.execute(sa.select(VARIANTS.c.id, VARIANTS.c.manifest)):
                needed |= {sha} | decode_variant(content).blobs
        return needed

    def models(self) -> list[str]:
        """Return the names of all models that have a version."""
        with self._database.read() as connection:
            query = sa.select(VERSIONS.c.model).distinct().order_by(VERSIONS.c.model)
            return list(connection.execute(query).scalars())

    def add_variant(self, variant: VariantRow) -> None:
        """Add a variant; adding the same again is fine.

        Raises:
            DigestError: the id is not the SHA-256 of the manifest, or is another version's variant.
            NotFoundError: no such version of this model.
        """
        model, number = variant.model, variant.number
        if hashlib.sha256(variant.manifest).hexdigest() != variant.id:
            raise DigestError(f"variant of {model} version {number}: id and manifest do not match")
        same = sa.select(VARIANTS.c.number).where(VARIANTS.c.model == model, VARIANTS.c.id == variant.id)
        with self._database.write() as connection:
            known = connection.execute(_keys(model).where(VERSIONS.c.number == number)).first()
            if known is None:
                raise NotFoundError(f"model {model}: no version {number}")
            require_files(model, number, collected=bool(known.collected))
            stored = connection.execute(same).scalar()
            if stored is not None and stored != number:
                raise DigestError(f"variant {variant.id[:12]} of {model} is one of version {stored}")
            if stored is None:
                connection.execute(sa.insert(VARIANTS), columns_of(variant))

    def variants(self, model: str, number: int | None = None) -> list[VariantRow]:
        """Return the variants of a model, or of one version of it: by version, then from small to large."""
        query = sa.select(VARIANTS).where(VARIANTS.c.model == model)
        if number is not None:
            query = query.where(VARIANTS.c.number == number)
        query = query.order_by(VARIANTS.c.number, VARIANTS.c.size_bytes, VARIANTS.c.id)
        with self._database.read() as connection:
            return [VariantRow(**row) for row in connection.execute(query).mappings()]

    def variant(self, model: str, prefix: str) -> VariantRow:
        """Return the variant whose id begins with `prefix`.

        Raises:
            NotFoundError: no variant of this model has such an id.
            SchemaError: several have.
        """
        found = [row for row in self.variants(model) if prefix and row.id.startswith(prefix)]
        if not found:
            raise NotFoundError(
                f"model {model}: no variant {prefix[:64]!r} (see `liberatai models show {model}`)"
            )
        if len(found) > 1:
            raise SchemaError(
                f"model {model}: {len(found)} variants begin with {prefix!r}: give more of the id"
            )
        return found[0]


def require_files(model: str, number: int, *, collected: bool) -> None:
    """Refuse work with a version whose files were removed.

    Raises:
        NotFoundError: they were.
    """
    if collected:
        raise NotFoundError(
            f"model {model} version {number}: its files were removed, because it is old and has no tag"
        )


def _keys(model: str) -> sa.Select[Any]:
    columns = (VERSIONS.c.number, VERSIONS.c.id, VERSIONS.c.collected)
    return sa.select(*columns).where(VERSIONS.c.model == model)


def _named(model: str) -> sa.CompoundSelect[Any]:
    """Return the query for the versions of a model that have a tag or a variant."""
    return sa.union(
        sa.select(TAGS.c.number).where(TAGS.c.model == model),
        sa.select(VARIANTS.c.number).where(VARIANTS.c.model == model),
    )


def _version_rows(
    connection: sa.Connection, model: str, condition: sa.ColumnElement[bool]
) -> list[VersionRow]:
    query = sa.select(VERSIONS).where(VERSIONS.c.model == model, condition).order_by(VERSIONS.c.number)
    rows = connection.execute(query).mappings().all()
    if not rows:
        return []
    tags: dict[int, list[str]] = {}
    within = TAGS.c.number.between(rows[0]["number"], rows[-1]["number"])
    named = sa.select(TAGS.c.tag, TAGS.c.number).where(TAGS.c.model == model, within)
    for tag, number in connection.execute(named.order_by(TAGS.c.tag)):
        tags.setdefault(number, []).append(tag)
    return [
        VersionRow(**{**row, "collected": bool(row["collected"])}, tags=tuple(tags.get(row["number"], ())))
        for row in rows
    ]


def _set_tags(connection: sa.Connection, model: str, tags: Mapping[str, int]) -> None:
    for tag, number in tags.items():
        if not tag or tag == "latest" or tag.isdigit():
            raise SchemaError(f"tag {tag!r}: must be a name, not a number and not 'latest'")
        row = {"model": model, "tag": tag, "number": number}
        upsert_many(connection, TAGS, [row], keys=("model", "tag"))
