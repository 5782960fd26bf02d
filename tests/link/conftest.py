"""Three worlds with one interface: the broker inside this process, amqtt, and Mosquitto; and async tests."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.brokers.start import RunningBroker, find_mosquitto, start_broker
from liberatai_core.link.link import Connected, Link, LinkEvent, Received, Will
from liberatai_core.link.memory import MemoryBroker, MemoryLink
from liberatai_core.link.mqtt import MqttLink, MqttSettings

TIMEOUT_S = 15
USERS = {name: f"{name}-password" for name in ("coordinator", "dev-a", "dev-b")}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def run() -> None:
        async with asyncio.timeout(60):
            await pyfuncitem.obj(**arguments)

    asyncio.run(run())
    return True


class Peer:
    """A link whose events are collected, so that a test can wait for the next one of a kind."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.queue: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def open(self) -> "Peer":
        self.task = asyncio.create_task(self._collect())
        await self.link.open()
        return self

    async def _collect(self) -> None:
        async for event in self.link.events():
            self.queue.put_nowait(event)

    async def next(self, kind: type[Any], *, ack: bool = True, timeout_s: float = TIMEOUT_S) -> Any:
        """Return the next event of a kind, acknowledged if it is a message."""
        async with asyncio.timeout(timeout_s):
            while True:
                event = await self.queue.get()
                if isinstance(event, kind):
                    if ack and isinstance(event, Received):
                        self.link.ack(event.token)
                    return event

    async def payloads(self, count: int) -> list[bytes]:
        return [(await self.next(Received)).payload for _ in range(count)]


class World:
    """What the contract tests need of a broker."""

    kind: str
    fleet: str

    def link(self, client_id: str, will: Will | None = None, **settings: Any) -> Link:
        raise NotImplementedError

    def cut(self, link: Link) -> None:
        """Break a connection as a pulled cable does."""
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def up(self, rest: str, device: str = "dev-a") -> str:
        return f"lai/v1/{self.fleet}/up/{device}/{rest}"

    def down(self, rest: str, device: str = "dev-a") -> str:
        return f"lai/v1/{self.fleet}/dn/{device}/{rest}"

    def pub(self, rest: str) -> str:
        return f"lai/v1/{self.fleet}/pub/{rest}"

    async def peer(self, client_id: str, *filters: str, will: Will | None = None, **settings: Any) -> Peer:
        """Open a link and wait until it is connected."""
        link = self.link(client_id, will, **settings)
        await link.subscribe(*filters)
        peer = await Peer(link).open()
        await peer.next(Connected)
        return peer


class MemoryWorld(World):
    kind = "memory"

    def __init__(self, fleet: str) -> None:
        self.fleet = fleet
        self._broker: MemoryBroker | None = None

    @property
    def broker(self) -> MemoryBroker:
        if self._broker is None:  # made inside of the running loop
            self._broker = MemoryBroker()
        return self._broker

    def link(self, client_id: str, will: Will | None = None, **_settings: Any) -> Link:
        return MemoryLink(self.broker, client_id, will)

    def cut(self, link: Link) -> None:
        assert isinstance(link, MemoryLink)
        self.broker.kill(link._client_id)

    def stop(self) -> None:
        self.broker.stop()

    def start(self) -> None:
        self.broker.start()


class MqttWorld(World):
    def __init__(self, broker: RunningBroker, fleet: str) -> None:
        self.broker, self.fleet, self.kind = broker, fleet, broker.kind

    def settings(self, client_id: str, **changes: Any) -> MqttSettings:
        user = client_id if client_id in USERS else "coordinator"
        settings = MqttSettings.from_url(self.broker.url, client_id=client_id)
        defaults: dict[str, Any] = {"username": user, "password": USERS[user], "reconnect_cap_s": 0.2}
        return replace(settings, **(defaults | changes))

    def link(self, client_id: str, will: Will | None = None, **settings: Any) -> Link:
        return MqttLink(self.settings(client_id, **settings), will)

    def cut(self, link: Link) -> None:
        assert isinstance(link, MqttLink)
        assert link._newest is not None
        link._newest.break_off("cable pulled")

    def stop(self) -> None:
        self.broker.kill()

    def start(self) -> None:
        self.broker.restart()


def make_world(kind: str, folder: Path, fleet: str) -> World:
    if kind == "memory":
        return MemoryWorld(fleet)
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    return MqttWorld(
        start_broker("mosquitto" if kind == "mosquitto" else "amqtt", folder, USERS, fleet), fleet
    )


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> str:
    """A fleet name of this test's own."""
    return f"f{abs(hash(request.node.nodeid)) % 10**12}"


@pytest.fixture(params=["memory", "amqtt", "mosquitto"])
def world(request: pytest.FixtureRequest, tmp_path: Path, fleet: str) -> Iterator[World]:
    """Every kind of broker in turn."""
    yield from _run(request.param, tmp_path, fleet)


@pytest.fixture(params=["amqtt", "mosquitto"])
def mqtt_world(request: pytest.FixtureRequest, tmp_path: Path, fleet: str) -> Iterator[World]:
    """Every kind of broker with sockets."""
    yield from _run(request.param, tmp_path, fleet)


@pytest.fixture
def mosquitto_world(tmp_path: Path, fleet: str) -> Iterator[World]:
    """Mosquitto only: MQTT 5."""
    yield from _run("mosquitto", tmp_path, fleet)


def _run(kind: str, folder: Path, fleet: str) -> Iterator[World]:
    world = make_world(kind, folder, fleet)
    yield world
    if isinstance(world, MqttWorld):
        world.broker.stop()


@pytest.fixture
def peer_of() -> Callable[[Link], Peer]:
    """Collect the events of any link."""
    return Peer


@pytest.fixture
def users() -> dict[str, str]:
    return dict(USERS)
