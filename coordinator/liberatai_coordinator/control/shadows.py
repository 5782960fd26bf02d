"""What devices shall be like, and what they are like by their own word.

What is wished is in the ledger and stands at the broker, one word per device, said anew by every coordinator.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import ShadowRow
from liberatai_core.contract.messages import AgentWish, Have, ModelWish, Want, Wishes
from liberatai_core.errors import ReplayError


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What a device shall be like, as a whole; see `messages.Want`."""

    settings: Wishes = Wishes()
    model: ModelWish | None = None
    agent: AgentWish | None = None


NOTHING: Final = Desired()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """One device, as it shall be and as it is.

    Attributes:
        version: of what is wished; 0: nothing was.
        updated_s: when it was wished.
        have: its own newest word; None: it has not answered since this start.
    """

    version: int = 0
    desired: Desired = NOTHING
    updated_s: float = 0.0
    have: Have | None = None

    @property
    def is_done(self) -> bool:
        """Whether the device says that it is as wished."""
        have = self.have
        return have is not None and have.version == self.version and have.state == "done"


@dataclass(slots=True, kw_only=True)
class Shadows:
    """The shadows of all devices.

    Attributes:
        heard_of: told of every device whose word is new.
    """

    fleet: Fleet
    ledger: Ledger
    publisher: Publisher
    heard_of: Callable[[str], None] = lambda _device: None
    _known: dict[str, Shadow] = field(default_factory=dict)

    def restore(self) -> None:
        """Read from the ledger what was wished."""
        for row in self.ledger.shadows.all():
            desired = msgspec.msgpack.decode(row.desired, type=Desired)
            self._known[row.device] = Shadow(version=row.version, desired=desired, updated_s=row.updated_s)

    async def publish(self) -> None:
        """Say again what was wished, with the epoch of this coordinator."""
        wants = [self._want(device, one) for device, one in self._known.items() if one.version]
        await self.publisher.retain_all((self._topic(want.device), want) for want in wants)

    async def publish_one(self, device: str) -> None:
        """Say again what was wished of one device: it was shut out meanwhile."""
        one = self._known.get(device)
        if one is not None and one.version:
            await self.publisher.retain(self._topic(device), self._want(device, one))

    def of(self, device: str) -> Shadow:
        """Return what is known of a device."""
        return self._known.get(device, Shadow())

    async def wish(self, device: str, desired: Desired) -> Shadow:
        """Wish that a device be so; on disk when this returns, and at the broker if there is one.

        Raises:
            NotFoundError: no such device. LiberataiError: it cannot be written; nothing has changed.
        """
        return (await self.wish_all([(device, desired)]))[device]

    async def wish_all(self, wishes: Iterable[tuple[str, Desired]]) -> dict[str, Shadow]:
        """Wish something of many devices, in one transaction; what is wished already is not said again."""
        made: dict[str, Shadow] = {}
        for device, desired in wishes:
            self.fleet.require(device)
            before = self.of(device)
            if before.version and before.desired == desired:
                continue
            made[device] = Shadow(
                version=before.version + 1, desired=desired, updated_s=clock.wall(), have=before.have
            )
        rows = [
            ShadowRow(
                device=device,
                version=one.version,
                desired=msgspec.msgpack.encode(one.desired),
                updated_s=one.updated_s,
            )
            for device, one in made.items()
        ]
        if rows:
            await asyncio.to_thread(self.ledger.shadows.put, rows)
        self._known |= made
        wants = [self._want(device, one) for device, one in made.items()]
        await self.publisher.retain_all((self._topic(want.device), want) for want in wants)
        return {device: self.of(device) for device in made} | made

    def heard(self, have: Have) -> None:
        """Take a device's verified word about itself.

        Raises:
            ReplayError: of an earlier start of the device, or about wishes that nobody had.
        """
        device = self.fleet.admit(have.device)
        if have.session < device.session:
            raise ReplayError(f"{have.device}: session {have.session}, the last one was {device.session}")
        known = self.of(have.device)
        if have.version > known.version:
            raise ReplayError(f"{have.device}: wish {have.version}, the newest is {known.version}")
        self._known[have.device] = Shadow(
            version=known.version, desired=known.desired, updated_s=known.updated_s, have=have
        )
        self.heard_of(have.device)

    def forget(self, device: str) -> None:
        """Forget a device; in the ledger it was forgotten with the device."""
        self._known.pop(device, None)

    def _want(self, device: str, one: Shadow) -> Want:
        return Want(
            device=device,
            epoch=self.ledger.epoch,
            version=one.version,
            settings=one.desired.settings,
            model=one.desired.model,
            agent=one.desired.agent,
        )

    def _topic(self, device: str) -> str:
        return self.publisher.topics.down(device, "want")
