"""Tokens for the API from another machine: made, listed, revoked, and asked for at the door."""

import asyncio
import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

from liberatai_coordinator import clock
from liberatai_coordinator.api.auditing import Actor
from liberatai_coordinator.client.fleet_views import Role, TokenView
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.rows import TokenRow

PREFIX: Final = "lai_"
"""So that a scanner finds a token that was left in a file."""
USED_S: Final = 60.0
"""How exactly it is written down when a token was used."""


@dataclass(frozen=True, slots=True)
class TokenOperations:
    """Tokens of a coordinator."""

    service: Service

    async def create(self, name: str, role: Role, ttl_s: float) -> TokenView:
        """Make a token; it is shown this once, and kept as a digest."""
        secret = PREFIX + secrets.token_urlsafe(32)
        now_s = clock.wall()
        row = TokenRow(
            name=name,
            role=role,
            sha256=_digest(secret),
            created_s=now_s,
            expires_s=now_s + ttl_s if ttl_s else 0.0,
        )
        await asyncio.to_thread(self.service.ledger.tokens.create, row)
        return _view(row, secret)

    async def list(self) -> tuple[TokenView, ...]:
        """Return all tokens, without what they are."""
        rows = await asyncio.to_thread(self.service.ledger.tokens.all)
        return tuple(_view(row, "") for row in rows)

    async def revoke(self, name: str) -> None:
        """Let a token be worth nothing from now on."""
        await asyncio.to_thread(self.service.ledger.tokens.revoke, name)

    async def who(self, secret: str) -> Actor | None:
        """Return who has this token; None: nobody, or not any more."""
        if not secret.startswith(PREFIX) or len(secret) > 128:
            return None
        row = await asyncio.to_thread(self.service.ledger.tokens.of, _digest(secret))
        now_s = clock.wall()
        if row is None or (row.expires_s and now_s >= row.expires_s):
            return None
        if now_s - row.used_s >= USED_S:
            await asyncio.to_thread(self.service.ledger.tokens.note_used, row.name, now_s)
        return Actor(name=row.name, role=row.role)


def _digest(secret: str) -> bytes:
    # 256 bits of chance need no slow hash: nobody guesses them.
    return hashlib.sha256(secret.encode()).digest()


def _view(row: TokenRow, secret: str) -> TokenView:
    return TokenView(
        name=row.name,
        role=row.role,
        created_s=row.created_s,
        expires_at=row.expires_s,
        used_at=row.used_s,
        token=secret,
    )
