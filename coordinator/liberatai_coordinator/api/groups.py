"""What a client may ask about groups of devices."""

import asyncio
from dataclasses import dataclass

from liberatai_coordinator import clock
from liberatai_coordinator.client.fleet_views import GroupView
from liberatai_coordinator.fleet import query
from liberatai_coordinator.fleet.facts import members
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.rows import GroupRow


@dataclass(frozen=True, slots=True)
class GroupOperations:
    """Groups of a coordinator: questions that are asked anew whenever the group is used."""

    service: Service

    async def create(self, name: str, where: str) -> GroupView:
        """Give a question a name.

        Raises:
            ConfigError: the question has a fault. StateError: there is a group of this name.
        """
        asked = query.parse(where)
        row = GroupRow(name=name, query=query.text_of(asked), created_s=clock.wall())
        await asyncio.to_thread(self.service.ledger.groups.create, row)
        return self._view(row, named=True)

    async def list(self) -> tuple[GroupView, ...]:
        """Return all groups with the number of their devices, sorted by name."""
        rows = await asyncio.to_thread(self.service.ledger.groups.all)
        return tuple(self._view(row, named=False) for row in rows)

    async def show(self, name: str) -> GroupView:
        """Return one group with the names of its devices."""
        return self._view(await asyncio.to_thread(self.service.ledger.groups.get, name), named=True)

    async def delete(self, name: str) -> None:
        """Forget a group; its devices stay."""
        await asyncio.to_thread(self.service.ledger.groups.delete, name)

    def _view(self, row: GroupRow, *, named: bool) -> GroupView:
        names = members(self.service.fleet, row.query, clock.wall())
        return GroupView(
            name=row.name,
            query=row.query,
            created_s=row.created_s,
            count=len(names),
            devices=names if named else (),
        )


async def query_of(service: Service, selector: str, where: str, group: str) -> query.Query | None:
    """Return what selector, question and group ask together; None: nothing is asked.

    Raises:
        ConfigError: one has a fault. NotFoundError: no such group.
    """
    parts: list[query.Query] = []
    if selector:
        parts.append(query.select(selector))
    if where:
        parts.append(query.parse(where))
    if group:
        row = await asyncio.to_thread(service.ledger.groups.get, group)
        parts.append(query.parse(row.query))
    return query.Both(tuple(parts)) if parts else None
