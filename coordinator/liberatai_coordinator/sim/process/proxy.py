"""A link of one device over TCP: rate, delay, jitter, loss as delay, and outages, without any privilege.

Every device connects to a port of its own. What comes is passed on when a link like that of its profile
would have delivered it (`line`, the same model as in virtual time). All links live on one loop.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from random import Random
from typing import Final

from liberatai_coordinator.sim.line import Line
from liberatai_core.profile import Network

READ_BYTES: Final = 16_384
WAITING_BYTES: Final = 262_144
"""On their way in one direction, before no more is read: what buffers of a router hold."""


class Proxy:
    """The link of one device.

    Attributes:
        line: its model; its counters are the bytes that passed.
        port: where the device connects.
    """

    def __init__(self, net: Network, random: Random, target: Callable[[], tuple[str, int]]) -> None:
        self.line = Line.of(net, random)
        self.port = 0
        self._target = target
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port of this machine."""
        self._server = await asyncio.start_server(self._met, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Break the connection, and refuse new ones."""
        self._is_cut = True
        self.reset()

    def mend(self) -> None:
        """Let the device connect again."""
        self._is_cut = False

    def reset(self) -> None:
        """Break the connection, as a NAT does that forgets."""
        for writer in self._open:
            writer.transport.abort()
        self.line.cut()

    def close(self) -> None:
        """Stop."""
        self.cut()
        if self._server is not None:
            self._server.close()

    async def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(*self._target())
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        ways = [
            asyncio.create_task(self._carry(reader, back, self.line.send)),
            asyncio.create_task(self._carry(there, writer, self.line.receive)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, back):
            self._open.discard(end)
            end.transport.abort()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        due: Callable[[float, int], float],
    ) -> None:
        """Pass on what comes, each piece at its time; no more than WAITING_BYTES are on their way."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING_BYTES // READ_BYTES)

        async def deliver() -> None:
            while True:
                at_s, piece = await waiting.get()
                if not piece:
                    return
                if at_s > loop.time():
                    await asyncio.sleep(at_s - loop.time())
                writer.write(piece)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            with contextlib.suppress(OSError):
                while piece := await reader.read(READ_BYTES):
                    await waiting.put((due(loop.time(), len(piece)), piece))
            await waiting.put((0.0, b""))
            with contextlib.suppress(OSError):
                await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)


class Proxies:
    """The links of all devices, on a loop in a thread of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._proxies: dict[str, Proxy] = {}
        self._thread.start()

    def add(self, device: str, net: Network, random: Random, target: Callable[[], tuple[str, int]]) -> int:
        """Make the link of a device; returns its port."""
        proxy = Proxy(net, random, target)
        asyncio.run_coroutine_threadsafe(proxy.start(), self._loop).result()
        self._proxies[device] = proxy
        return proxy.port

    def do(self, device: str, what: Callable[[Proxy], None]) -> None:
        """Do something to a link."""
        self._loop.call_soon_threadsafe(what, self._proxies[device])

    def moved(self, device: str) -> tuple[int, int]:
        """Return the bytes from and to a device."""
        line = self._proxies[device].line
        return line.up.moved_bytes, line.down.moved_bytes

    def close(self) -> None:
        """Stop all."""

        async def stop() -> None:
            for proxy in self._proxies.values():
                proxy.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
