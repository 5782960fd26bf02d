"""What a client may ask about devices, and do to them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.api import present
from liberatai_coordinator.api.groups import query_of
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.client.fleet_views import LogView, PingView
from liberatai_coordinator.client.views import ConditionView, DeviceView
from liberatai_coordinator.fleet import facts, query
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.jobs.records import newest_contributions
from liberatai_coordinator.service import Service
from liberatai_core import __version__
from liberatai_core.errors import NotFoundError

PART: Final = 250
"""Devices that are shown at a time: some milliseconds."""


@dataclass(frozen=True, slots=True)
class DeviceOperations:
    """Devices of a coordinator."""

    service: Service

    async def list(self, selector: str = "", where: str = "", group: str = "") -> tuple[DeviceView, ...]:
        """Return all devices, or those of which everything asked is true, sorted by name.

        Raises:
            ConfigError: selector or question has a fault. NotFoundError: no such group.
        """
        asked = await query_of(self.service, selector, where, group)
        views, invited = [], self._invited()
        ready, wall_s = set(self.service.fleet.ready_names), clock.wall()
        for number, (name, device) in enumerate(sorted(self.service.fleet.devices.items()), 1):
            if asked is None or query.matches(
                asked, facts.facts_of(device, ready=name in ready, wall_s=wall_s)
            ):
                views.append(self._view(device, invited))
            if number % PART == 0:
                await asyncio.sleep(0)  # ten thousand would be a silence that devices notice
        return tuple(views)

    async def show(self, device: str) -> DeviceView:
        """Return one device."""
        known = await self._known(device)
        view = self._view(known, self._invited())
        given = await asyncio.to_thread(newest_contributions, self.service.ledger, device)
        views = tuple(present.contribution_view(*one) for one in given)
        return msgspec.structs.replace(view, contributions=views, conditions=self._conditions(known))

    async def approve(self, device: str, key: str = "") -> DeviceView:
        """Let a pending device in, if its key is the one that was compared; idempotent."""
        await self._known(device)
        return self._view(self.service.doors.approve(device, key), self._invited())

    async def reject(self, device: str, reason: str) -> None:
        """Send a pending device away; its key is refused for good."""
        await self._known(device)
        self.service.doors.reject(device, reason)

    async def quarantine(self, device: str, reason: str) -> DeviceView:
        """Shut a device out: nothing it sends counts from now on."""
        await self._known(device)
        return self._view(self.service.doors.quarantine(device, reason), self._invited())

    async def release(self, device: str) -> DeviceView:
        """Let a quarantined device in again."""
        await self._known(device)
        return self._view(self.service.doors.release(device), self._invited())

    async def decommission(self, device: str, reason: str) -> None:
        """Remove a device: its key is refused for good, what is known of it is deleted."""
        await self._known(device)
        self.service.doors.decommission(device, reason)

    async def rekey(self, device: str, key: str = "") -> DeviceView:
        """Take the key that asks for a device's name: it was set up anew."""
        await self._known(device)
        return self._view(self.service.doors.rekey(device, key), self._invited())

    async def label(self, device: str, labels: Mapping[str, str | None]) -> DeviceView:
        """Give a device labels, or take them away (None)."""
        await self._known(device)
        return self._view(self.service.doors.label(device, labels), self._invited())

    async def drain(self, device: str, reason: str) -> DeviceView:
        """Give a device no new task; what it works on counts."""
        await self._known(device)
        return self._view(self.service.doors.drain(device, reason), self._invited())

    async def resume(self, device: str) -> DeviceView:
        """Let a drained device work again."""
        await self._known(device)
        return self._view(self.service.doors.resume(device), self._invited())

    async def ping(self, device: str) -> PingView:
        """Ask a device whether it is there."""
        await self._known(device)
        answer, seconds = await self.service.asking.ask(device, "ping")
        return PingView(device=device, seconds=seconds, session=answer.session)

    async def probe(self, device: str) -> DeviceView:
        """Let a device look at its machine again; what is new of it, it tells."""
        await self._known(device)
        await self.service.asking.ask(device, "probe")
        return await self.show(device)

    async def logs(self, device: str, lines: int = 50) -> LogView:
        """Return the newest lines of a device's log."""
        await self._known(device)
        answer, _ = await self.service.asking.ask(device, "logs", lines)
        return LogView(device=device, lines=answer.lines)

    async def _known(self, name: str) -> Device:
        try:
            return self.service.fleet.require(name)
        except NotFoundError as error:
            raise await not_found(error, name, list(self.service.fleet.devices)) from None

    def _conditions(self, device: Device) -> tuple[ConditionView, ...]:
        fleet = self.service.fleet
        found = facts.conditions_of(
            device,
            ready=device.id in fleet.ready_names,
            connected=fleet.connected,
            knock=fleet.knocks.get(device.id),
            version=__version__,
        )
        enrolment = self.service.enrolment
        if enrolment is not None and (words := enrolment.ending(device.id)):
            found = (*found, facts.Condition("CertificateEnding", True, words, enrolment.ends_s[device.id]))
        return tuple(msgspec.convert(one, ConditionView, from_attributes=True) for one in found)

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
            fleet.knocks.get(device.id),
            self.service.enrolment.ends_s.get(device.id, 0.0) if self.service.enrolment else 0.0,
        )
