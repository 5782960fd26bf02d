"""How a simulated device gets blobs: asked for over its wire, kept on its disk."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from liberatai_agent import events as on
from liberatai_agent.exchange.hearing import Ear
from liberatai_coordinator.sim.virtual.disk import Disk
from liberatai_coordinator.sim.virtual.surroundings import Surroundings
from liberatai_coordinator.sim.virtual.wire import SUBSCRIBE_BYTES, Wire
from liberatai_core.contract.chunks import count
from liberatai_core.contract.frame import expect
from liberatai_core.contract.limits import MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobManifest, BlobRef
from liberatai_core.errors import LiberataiError
from liberatai_core.link.memory import Connection, Packet

BLOB_TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class _Fetch:
    """A blob on its way."""

    ref: BlobRef
    timer: asyncio.TimerHandle
    asked: list[str] = field(default_factory=list)
    parts: dict[int, bytes] = field(default_factory=dict)


class Fetching:
    """The blobs on their way to a device."""

    __slots__ = ("_disk", "_ear", "_happened", "_note", "_under_way", "_wire", "_world")

    def __init__(
        self,
        world: Surroundings,
        wire: Wire,
        disk: Disk,
        ear: Ear,
        happened: Callable[[on.Happened], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._world, self._wire, self._disk, self._happened = world, wire, disk, happened
        self._ear, self._note = ear, note
        self._under_way: dict[str, _Fetch] = {}

    def take(self, packet: Packet) -> bool:
        """Take a packet if it is of a blob that is on its way; False: it is not."""
        fetch = self._under_way.get(packet.topic.split("/")[5]) if "/pub/b/" in packet.topic else None
        if fetch is not None:
            self._part(fetch, packet)
        return fetch is not None

    def fail(self, code: str, text: str) -> None:
        """Give all blobs up."""
        for blob in list(self._under_way):
            self._failed(blob, code, text)

    def keep(self, wanted: frozenset[str]) -> None:
        """Wait no more for what is not wanted."""
        for blob in [blob for blob in self._under_way if blob not in wanted]:
            self._end(blob)

    def forget(self) -> None:
        """Forget everything, as a process that ends."""
        for one in self._under_way.values():
            one.timer.cancel()
        self._under_way.clear()

    def fetch(self, ref: BlobRef) -> None:
        """Ask for a blob; what becomes of it happens."""
        if ref.blob in self._under_way:
            return
        if ref.blob in self._disk.blobs:
            self._happened(on.BlobStored(blob=ref.blob))
            return
        timer = self._world.loop.call_later(
            BLOB_TIMEOUT_S, self._failed, ref.blob, "E_NOT_FOUND", "nothing came"
        )
        fetch = self._under_way[ref.blob] = _Fetch(ref, timer)
        self._ask(fetch, None if ref.size_bytes > MAX_SINGLE_BYTES else 0)

    def _ask(self, fetch: _Fetch, part: int | None) -> None:
        topic = self._world.topics.blob(fetch.ref.blob, part)
        fetch.asked.append(topic)
        arrives_s = self._wire.line.send(self._world.loop.time(), SUBSCRIBE_BYTES + len(topic))
        self._world.loop.call_at(arrives_s, self._subscribe, self._wire.connection, fetch, topic)

    def _subscribe(self, connection: Connection | None, fetch: _Fetch, topic: str) -> None:
        if (
            connection is not None
            and connection is self._wire.connection
            and self._under_way.get(fetch.ref.blob) is fetch
        ):
            self._world.broker.subscribe(connection, topic)

    def _part(self, fetch: _Fetch, packet: Packet) -> None:
        place, ref, world = packet.topic.rpartition("/")[2], fetch.ref, self._world
        if place == "m":
            try:
                manifest = expect(packet.payload, BlobManifest, world.topics.fleet, self._ear.key)
            except LiberataiError as error:
                self._note("refused", f"{error.code}: {error}")
                return
            fetch.parts = dict.fromkeys(range(count(ref.size_bytes, manifest.chunk_bytes)), b"")
            for number in fetch.parts:
                self._ask(fetch, number)
            return
        if ref.size_bytes > MAX_SINGLE_BYTES and not fetch.parts:
            return
        fetch.parts[int(place)] = packet.payload
        if not all(fetch.parts.values()):
            return
        content = packet.payload if len(fetch.parts) == 1 else b"".join(fetch.parts.values())
        if not world.blobs.keep(ref, content):
            self._failed(ref.blob, "E_DIGEST", "not what its name says")
        elif self._disk.full:
            self._failed(ref.blob, "E_DISK", "no space left on device")
        else:
            self._end(ref.blob)
            self._disk.blobs.add(ref.blob)
            self._happened(on.BlobStored(blob=ref.blob))

    def _failed(self, blob: str, code: str, text: str) -> None:
        self._end(blob)
        self._happened(on.BlobFailed(blob=blob, code=code, text=text))

    def _end(self, blob: str) -> None:
        fetch = self._under_way.pop(blob, None)
        if fetch is None:
            return
        fetch.timer.cancel()
        if self._wire.connection is not None:
            for topic in fetch.asked:
                self._world.broker.unsubscribe(self._wire.connection, topic)
