"""What devices say costs by the devices that say something, not by those that are known."""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from liberatai_coordinator.fleet.devices import Device, Fleet
from liberatai_coordinator.intake.presence import Presence
from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract.messages import Capability, Report, SessionSeen, State, Telemetry

TALKERS = ("d0", "d1", "d2")


class Unwalked(dict[str, Device]):
    """Devices by name; whoever goes through all of them is counted."""

    walks = 0

    def __iter__(self) -> Iterator[str]:
        self.walks += 1
        return super().__iter__()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()


class Told:
    """Jobs that note how many devices they were told of."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def devices_changed(self, devices: Collection[Device], now_s: float) -> None:
        self.names += [device.id for device in devices]

    def reported(self, device: Device, report: Report, now_s: float) -> None: ...

    def base_missing(self, device: Device) -> None: ...

    def tick(self, now_s: float) -> None: ...

    def connected_again(self, now_s: float) -> None: ...


async def answer(_: SessionSeen) -> None:
    raise AssertionError("nobody speaks in an old session")


def key_of(name: str) -> bytes:
    return name.encode().ljust(32, b"k")


async def talk(presence: Presence, sent_bytes: int) -> None:
    for name in TALKERS:
        key = key_of(name)
        word = Telemetry(device=name, session=1, sent_bytes=sent_bytes, received_bytes=1)
        capability = Capability(device=name, public_key=key, session=1, agent_version="1", tier="full")
        for message in (capability, State(device=name, state="online", session=1), word):
            await presence.hear(message, key, retained=False)
    presence._tell()


def test_nobody_goes_through_all_known_devices_for_what_a_few_say(tmp_path: Path) -> None:
    with closing(Ledger.open(tmp_path, threaded=False)) as ledger:
        fleet, told = Fleet(enrolment="open"), Told()
        fleet.restore([Device(id=f"k{n}", public_key=key_of(f"k{n}"), status="approved") for n in range(500)])
        fleet.devices = known = Unwalked(fleet.devices)
        presence = Presence(fleet=fleet, ledger=ledger, jobs=told, answer=answer)
        asyncio.run(talk(presence, 10))
        presence.save_traffic()
        fleet.expire(1.0)
        assert [device.id for device in fleet.ready()] == list(TALKERS)
        assert (known.walks, told.names) == (0, list(TALKERS))
        ledger.writer.write_queued(now=True)
        assert {name: row.sent_bytes for name, row in ledger.devices.traffic().items()} == dict.fromkeys(
            TALKERS, 10
        )


def test_what_nobody_sent_since_is_not_written_again(tmp_path: Path) -> None:
    with closing(Ledger.open(tmp_path, threaded=False)) as ledger:
        presence = Presence(fleet=Fleet(enrolment="open"), ledger=ledger, jobs=Told(), answer=answer)
        asyncio.run(talk(presence, 10))
        presence.save_traffic()
        ledger.writer.write_queued(now=True)
        presence.save_traffic()
        assert not ledger.writer.has_latest
        asyncio.run(talk(presence, 25))
        presence.save_traffic()
        ledger.writer.write_queued(now=True)
        assert {row.sent_bytes for row in ledger.devices.traffic().values()} == {25}
