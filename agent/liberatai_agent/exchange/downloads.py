"""Brings the files of models to the disk: one task per file under way, each started once."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from liberatai_agent.events import BlobFailed, BlobStored, SpecRead
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.store.blobs import BlobStore, Fetcher
from liberatai_core.contract.frame import decode_spec
from liberatai_core.contract.limits import MAX_SPEC_BYTES
from liberatai_core.contract.messages import BlobRef
from liberatai_core.errors import LiberataiError
from liberatai_core.link.link import Received

log = logging.getLogger(__name__)

Answer = BlobStored | BlobFailed | SpecRead
Run = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Downloads:
    """Fetches files and reads specs.

    Args:
        store: where they lie.
        fetcher: asks for them.
        meter: measures the link.
        happened: told what became of each.
        run: runs a coroutine, and sees to its end.
    """

    def __init__(
        self,
        store: BlobStore,
        fetcher: Fetcher,
        meter: LinkMeter,
        happened: Callable[[Answer], None],
        run: Run,
    ) -> None:
        self._run = run
        self._store, self._fetcher, self._meter, self._happened = store, fetcher, meter, happened
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def fetch(self, ref: BlobRef) -> None:
        """Bring a file to the disk, unless that is under way."""
        if ref.blob not in self._tasks:
            self._tasks[ref.blob] = self._run(self._fetch(ref))

    def keep_only(self, blobs: frozenset[str]) -> None:
        """Stop and delete everything else."""
        for blob in [blob for blob in self._tasks if blob not in blobs]:
            self._tasks.pop(blob).cancel()
        self._store.keep_only(blobs)

    def read_spec(self, blob: str) -> None:
        """Read what a task is for."""
        try:
            spec = decode_spec(self._store.read(blob, MAX_SPEC_BYTES))
        except LiberataiError as error:
            self._happened(BlobFailed(blob=blob, code=error.code, text=str(error)))
        else:
            self._happened(SpecRead(blob=blob, spec=spec))

    def deliver(self, message: Received) -> None:
        """Take one message of a blob topic."""
        self._fetcher.deliver(message)

    async def close(self) -> None:
        """Stop all."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, ref: BlobRef) -> None:
        try:
            with self._meter.fetching():
                await self._fetcher.fetch(ref)
        except LiberataiError as error:
            self._forget(ref)
            self._happened(BlobFailed(blob=ref.blob, code=error.code, text=str(error)))
        else:
            self._forget(ref)
            self._happened(BlobStored(blob=ref.blob))

    def _forget(self, ref: BlobRef) -> None:
        # A cancelled download may have been followed by a new one of the same file.
        if self._tasks.get(ref.blob) is asyncio.current_task():
            del self._tasks[ref.blob]
