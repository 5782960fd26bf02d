"""What a client may ask about devices."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from liberatai_coordinator.api import present
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.client.views import DeviceView
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.jobs.records import newest_contributions
from liberatai_coordinator.service import Service
from liberatai_core.errors import NotFoundError

PART: Final = 250
"""Devices that are shown at a time: some milliseconds."""


@dataclass(frozen=True, slots=True)
class DeviceOperations:
    """Devices of a coordinator."""

    service: Service

    async def list(self) -> tuple[DeviceView, ...]:
        """Return all devices, sorted by name."""
        views, invited = [], self._invited()
        for number, (_, device) in enumerate(sorted(self.service.fleet.devices.items()), 1):
            views.append(self._view(device, invited))
            if number % PART == 0:
                await asyncio.sleep(0)  # ten thousand would be a silence that devices notice
        return tuple(views)

    async def show(self, device: str) -> DeviceView:
        """Return one device."""
        view = self._view(await self._known(device), self._invited())
        given = await asyncio.to_thread(newest_contributions, self.service.ledger, device)
        views = tuple(present.contribution_view(*one) for one in given)
        return msgspec.structs.replace(view, contributions=views)

    async def approve(self, device: str) -> DeviceView:
        """Let a pending device in; idempotent."""
        await self._known(device)
        return self._view(self.service.set_status(device, "approved", ""), self._invited())

    async def quarantine(self, device: str, reason: str) -> DeviceView:
        """Shut a device out: nothing it sends counts from now on."""
        await self._known(device)
        return self._view(self.service.set_status(device, "quarantined", reason), self._invited())

    async def release(self, device: str) -> DeviceView:
        """Let a quarantined device in again."""
        await self._known(device)
        return self._view(self.service.set_status(device, "approved", ""), self._invited())

    async def _known(self, name: str) -> Device:
        try:
            return self.service.fleet.require(name)
        except NotFoundError as error:
            raise await not_found(error, name, list(self.service.fleet.devices)) from None

    def _invited(self) -> dict[str, tuple[str, int]]:
        """Return the job and the round that wait for each device."""
        return {
            device: (name, job.open_round.number)
            for name, job in self.service.runners.items()
            if job.open_round is not None
            for device in job.open_round.waiting
        }

    def _view(self, device: Device, invited: Mapping[str, tuple[str, int]]) -> DeviceView:
        structure = ""
        for job in self.service.runners.values():
            if device.id in job.roster.assigned:
                structure = job.roster.assigned[device.id].structure
        fleet = self.service.fleet
        return present.device_view(
            device,
            fleet.shown(device),
            structure,
            fleet.refusals.get(device.id, {}),
            invited.get(device.id),
        )
