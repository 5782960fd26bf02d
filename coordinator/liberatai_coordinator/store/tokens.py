"""Who may use the API from another machine. Of a token only its SHA-256 is kept."""

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of
from liberatai_coordinator.store.rows import TokenRow
from liberatai_coordinator.store.tables import TOKENS
from liberatai_core.errors import NotFoundError, StateError


class TokenStore:
    """Tokens by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, token: TokenRow) -> None:
        """Remember a token.

        Raises:
            StateError: there is one of this name.
        """
        with self._database.write() as connection:
            if connection.execute(sa.select(TOKENS.c.name).where(TOKENS.c.name == token.name)).first():
                raise StateError(f"token {token.name}: exists already; revoke it first")
            connection.execute(sa.insert(TOKENS), [columns_of(token)])

    def all(self) -> list[TokenRow]:
        """Return all tokens, sorted by name."""
        with self._database.read() as connection:
            query = sa.select(TOKENS).order_by(TOKENS.c.name)
            return [TokenRow(**row) for row in connection.execute(query).mappings().all()]

    def of(self, sha256: bytes) -> TokenRow | None:
        """Return the token with this digest; None: there is none."""
        with self._database.read() as connection:
            query = sa.select(TOKENS).where(TOKENS.c.sha256 == sha256)
            row = connection.execute(query).mappings().first()
        return None if row is None else TokenRow(**row)

    def note_used(self, name: str, used_s: float) -> None:
        """Note when a token was used."""
        with self._database.write() as connection:
            connection.execute(sa.update(TOKENS).where(TOKENS.c.name == name).values(used_s=used_s))

    def revoke(self, name: str) -> None:
        """Let a token be worth nothing from now on.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._database.write() as connection:
            if not connection.execute(sa.delete(TOKENS).where(TOKENS.c.name == name)).rowcount:
                raise NotFoundError(f"token {name}: not known (see `liberatai tokens list`)")
