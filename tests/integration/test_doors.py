"""Devices are let in, drained, shut out, removed and taken anew, while rounds go on."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from tests.integration.kit import FLEET, ScriptedDevice, coordinator, devices, ended, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.service import Service
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LinkError, NotFoundError, StateError
from liberatai_core.link.memory import MemoryBroker

pytestmark = pytest.mark.anyio

TOPICS = Topics(fleet=FLEET)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def there(service: Service, *names: str) -> bool:
    return set(names) <= service.fleet.ready_names


def revoked(service: Service) -> int:
    """Refusals of those who are no device of the fleet any more."""
    return service.fleet.refusals.get("", Counter())["E_REVOKED"]


async def test_a_drained_device_finishes_its_task_and_gets_no_other(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    async with coordinator(broker, tmp_path) as service, devices(broker, "a", "b", "c") as fleet:
        await until(lambda: there(service, "a", "b", "c"))
        ask = Operations.of(service)
        fleet[2].answers = False
        await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=2, quorum=0.5), str(tmp_path))
        await until(lambda: len(fleet[2].tasks) == 1)
        assert (await ask.devices.drain("c", "new fans")).drained
        fleet[2].answers = True
        await fleet[2]._answer(fleet[2].tasks[0])
        await until(lambda: ended(service))
        assert len(fleet[2].receipts) == 1
        assert fleet[2].receipts[0].accepted
        assert len(fleet[2].tasks) == 1
        (drained,) = [one for one in (await ask.devices.show("c")).conditions if one.name == "Drained"]
        assert drained.reason == "new fans"
        assert drained.since_s > 0
        assert [one.id for one in await ask.devices.list("", "drained")] == ["c"]
        assert not (await ask.devices.resume("c")).drained
        assert there(service, "c")


async def test_labels_and_drained_devices_outlive_a_restart(broker: MemoryBroker, tmp_path: Path) -> None:
    async with devices(broker, "a", "b"):
        async with coordinator(broker, tmp_path) as service:
            await until(lambda: there(service, "a", "b"))
            ask = Operations.of(service)
            await ask.devices.label("a", {"site": "hall", "floor": "2"})
            await ask.devices.label("a", {"floor": None})
            await ask.devices.drain("a", "why not")
            await ask.groups.create("hall", "label.site == 'hall'")
        async with coordinator(broker, tmp_path) as service:
            await until(lambda: there(service, "b"))
            ask = Operations.of(service)
            assert (await ask.groups.show("hall")).devices == ("a",)
            known = await ask.devices.show("a")
            assert (known.labels, known.drained) == ({"site": "hall"}, True)
            assert "a" not in service.fleet.ready_names


async def test_a_decommissioned_device_is_refused_for_good_and_no_round_waits_for_it(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    async with devices(broker, "a", "b", "thief") as fleet:
        async with coordinator(broker, tmp_path) as service:
            await until(lambda: there(service, "a", "b", "thief"))
            fleet[2].answers = False
            await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=2, quorum=0.5), str(tmp_path))
            await until(lambda: len(fleet[2].tasks) == 1)
            await Operations.of(service).devices.decommission("thief", "stolen")
            await service.doors.settled()
            await until(lambda: ended(service))
            assert not [topic for topic in broker.retained if "/thief/" in topic]
            assert len(fleet[2].tasks) == 1
            fleet[2].answers = True
            await fleet[2]._answer(fleet[2].tasks[0])
            await fleet[2]._introduce()
            await until(lambda: revoked(service) >= 3)
            assert not fleet[2].receipts
            assert "thief" not in service.fleet.devices
            with pytest.raises(NotFoundError):
                await Operations.of(service).devices.show("thief")
            names = [one.name for one in await Operations.of(service).events.last(50, "thief")]
            assert names[-2:] == ["decommissioned", "shut_out"]
        async with coordinator(broker, tmp_path) as service:
            await until(lambda: there(service, "a", "b"))
            await fleet[2]._introduce()
            await until(lambda: revoked(service) >= 3)
            assert "thief" not in service.fleet.devices


async def test_a_device_with_a_new_key_knocks_and_is_taken(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path) as service:
        ask = Operations.of(service)
        async with devices(broker, "a"):
            await until(lambda: there(service, "a"))
            await ask.devices.label("a", {"site": "hall"})
            with pytest.raises(StateError, match="no other key"):
                await ask.devices.rekey("a")
        anew = ScriptedDevice(broker, "a")
        anew.signer = Signer.from_seed(b"a new card".ljust(32, b"-"), FLEET)
        running = asyncio.create_task(anew.run())
        await until(lambda: "a" in service.fleet.knocks)
        shown = await ask.devices.show("a")
        assert [one.name for one in shown.conditions if one.name == "Knocking"]
        assert "knocking" in [one.name for one in await ask.events.last(20, "a")]
        with pytest.raises(StateError, match="another machine"):
            await ask.devices.rekey("a", "0" * 16)
        taken = await ask.devices.rekey("a", shown.knocks[:19])
        assert (taken.key, taken.labels, taken.status) == (shown.knocks, {"site": "hall"}, "approved")
        await anew._introduce()
        await until(lambda: there(service, "a"))
        old = ScriptedDevice(broker, "old")
        old.signer = Signer.from_seed(b"a".ljust(32, b"-"), FLEET)
        assert service.fleet.buried.owners == {old.signer.public_key: "a"}
        await anew.link.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_who_is_approved_by_key_has_that_key(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path) as service, devices(broker, "a"):
        await until(lambda: there(service, "a"))
        ask = Operations.of(service)
        key = (await ask.devices.show("a")).key
        with pytest.raises(StateError, match="another machine"):
            await ask.devices.approve("a", "f" * 16)
        assert (await ask.devices.approve("a", key)).status == "approved"
        await ask.devices.quarantine("a", "nonsense")
        with pytest.raises(StateError, match="quarantined"):
            await ask.devices.approve("a")
        assert (await ask.devices.release("a")).status == "approved"


async def test_the_order_is_coordinator_then_broker_then_what_stands_there(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    """A step at the broker that fails is told and done later; the coordinator refuses all the while."""
    async with coordinator(broker, tmp_path) as service, devices(broker, "a", "b"):
        await until(lambda: there(service, "a", "b"))
        seen: list[tuple[frozenset[str], str, bool]] = []

        async def sync(shut_out: frozenset[str], revoke: str, _reason: str) -> None:
            stands = TOPICS.up("a", "caps") in broker.retained
            seen.append((shut_out, revoke, stands and "a" not in service.fleet.ready_names))
            if len(seen) == 1:
                raise LinkError("the folder of the broker is not there")

        service.doors.broker = sync
        service.doors.retry_s = 0.01
        await Operations.of(service).devices.quarantine("a", "odd")
        await service.doors.settled()
        assert seen == [(frozenset({"a"}), "", True)] * 2
        assert not [topic for topic in broker.retained if "/up/a/" in topic]
        told = [(one.name, one.code) for one in await Operations.of(service).events.last(50, "a")]
        assert told[-3:] == [("quarantined", ""), ("broker_behind", "E_LINK"), ("shut_out", "")]
        await Operations.of(service).devices.decommission("a", "stolen")
        await service.doors.settled()
        assert seen[2][:2] == (frozenset({"a"}), "a")
