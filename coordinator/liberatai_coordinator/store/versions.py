"""Versions of models, their tags and their variants. A version exists once its row is here (promise P3)."""

import hashlib
from collections.abc import Mapping

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rows import VariantRow, VersionRow
from liberatai_coordinator.store.tables import TAGS, VARIANTS, VERSIONS
from liberatai_core.errors import DigestError, NotFoundError, SchemaError


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
        with self._database.write() as connection:
            rows = _version_rows(connection, model)
            if any(row.id == version.id and row.number == number for row in rows):
                return
            if any(row.id == version.id or row.number == number for row in rows):
                raise DigestError(f"{model} version {number}: another version has this number or this id")
            if version.parent is not None and version.parent not in {row.id for row in rows}:
                raise DigestError(f"{model} version {number}: its parent {version.parent[:12]} is not stored")
            values = columns_of(version)
            del values["tags"]
            connection.execute(sa.insert(VERSIONS), values)
            _set_tags(connection, version.model, dict.fromkeys(version.tags, number))

    def set_tag(self, model: str, tag: str, number: int) -> None:
        """Let a tag name this version; it names no other any more.

        Raises:
            NotFoundError: no such version.
            SchemaError: the tag could be taken for a number, or for "latest".
        """
        with self._database.write() as connection:
            if not any(row.number == number for row in _version_rows(connection, model)):
                raise NotFoundError(f"model {model}: no version {number}")
            _set_tags(connection, model, {tag: number})

    def all(self, model: str) -> list[VersionRow]:
        """Return the versions of a model, oldest first; none if there is no such model."""
        with self._database.read() as connection:
            return _version_rows(connection, model)

    def get(self, model: str, ref: int | str = "latest") -> VersionRow:
        """Return one version by number, tag, full id, or "latest".

        Raises:
            NotFoundError: no such model or version.
        """
        rows = self.all(model)
        if not rows:
            raise NotFoundError(f"model {model}: not known (see `liberatai models list`)")
        if ref == "latest":
            return rows[-1]
        text = str(ref)
        for row in rows:
            if text == str(row.number) or text in row.tags or text == row.id:
                return row
        raise NotFoundError(f"model {model}: no version {text[:64]!r} (see `liberatai models log {model}`)")

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
            if not any(row.number == number for row in _version_rows(connection, model)):
                raise NotFoundError(f"model {model}: no version {number}")
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


def _version_rows(connection: sa.Connection, model: str) -> list[VersionRow]:
    tags: dict[int, list[str]] = {}
    for tag, number in connection.execute(
        sa.select(TAGS.c.tag, TAGS.c.number).where(TAGS.c.model == model).order_by(TAGS.c.tag)
    ):
        tags.setdefault(number, []).append(tag)
    query = sa.select(VERSIONS).where(VERSIONS.c.model == model).order_by(VERSIONS.c.number)
    rows = connection.execute(query).mappings()
    return [VersionRow(**row, tags=tuple(tags.get(row["number"], ()))) for row in rows]


def _set_tags(connection: sa.Connection, model: str, tags: Mapping[str, int]) -> None:
    for tag, number in tags.items():
        if not tag or tag == "latest" or tag.isdigit():
            raise SchemaError(f"tag {tag!r}: must be a name, not a number and not 'latest'")
        row = {"model": model, "tag": tag, "number": number}
        upsert_many(connection, TAGS, [row], keys=("model", "tag"))
