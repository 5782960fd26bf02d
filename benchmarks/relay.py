"""A TCP relay between devices and their server that counts what it carries: TLS and all, both ways."""

import asyncio
import threading


class Relay:
    """Passes bytes between devices and their server and counts them, in a thread of its own.

    Attributes:
        port: where devices connect, on this machine.
        up, down: bytes carried from and to the devices.
        connections, ended: made so far, and of these over.
    """

    def __init__(self, host: str, port: int) -> None:
        self._broker = (host, port)
        self.up = self.down = self.connections = self.ended = 0
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    def carried(self) -> tuple[int, int]:
        """Return the bytes carried so far, from and to the devices."""
        return self.up, self.down

    def close(self) -> None:
        """Stop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        carrying = asyncio.all_tasks(self._loop)
        for task in carrying:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*carrying, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, back = await asyncio.open_connection(*self._broker)
            await asyncio.gather(self._pass(reader, back, up=True), self._pass(there, writer, up=False))
        except (OSError, asyncio.CancelledError):
            pass  # a task that ends cancelled would be complained about
        finally:
            self.ended += 1
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
