"""What a client may ask about what happened, and about who changed what."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from liberatai_coordinator.client.fleet_views import AuditView, EventView
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.rows import AuditRow

Shown = TypeVar("Shown", EventView, AuditView)


@dataclass(frozen=True, slots=True)
class EventOperations:
    """Events of a fleet."""

    service: Service

    async def after(self, number: int, device: str) -> tuple[EventView, ...]:
        """Return the events above a number, the oldest first; at most 1000."""
        rows = await asyncio.to_thread(self.service.ledger.events.after, number, device)
        return _views(rows, EventView)

    async def last(self, count: int, device: str) -> tuple[EventView, ...]:
        """Return the newest events, the oldest of them first."""
        rows = await asyncio.to_thread(self.service.ledger.events.last, count, device)
        return _views(rows, EventView)


@dataclass(frozen=True, slots=True)
class AuditOperations:
    """Changes that operators asked for."""

    service: Service

    async def note(self, entry: AuditRow) -> None:
        """Write a change down; it is on disk when this returns."""
        await asyncio.to_thread(self.service.ledger.audit.note, entry)

    async def after(self, number: int) -> tuple[AuditView, ...]:
        """Return the changes above a number, the oldest first; at most 1000."""
        return _views(await asyncio.to_thread(self.service.ledger.audit.after, number), AuditView)

    async def last(self, count: int) -> tuple[AuditView, ...]:
        """Return the newest changes, the oldest of them first."""
        return _views(await asyncio.to_thread(self.service.ledger.audit.last, count), AuditView)


def _views(rows: Sequence[object], kind: type[Shown]) -> tuple[Shown, ...]:
    return tuple(msgspec.convert(row, kind, from_attributes=True) for row in rows)
