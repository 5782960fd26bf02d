"""A release of the agent by wish of the fleet: fetched, believed for its release key alone, unpacked.

The coordinator says which one; what may run is said by the key in the device's own settings.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from liberatai_agent.config import AgentConfig
from liberatai_agent.store.blobs import BlobStore, Fetcher
from liberatai_agent.updates import slots
from liberatai_core.contract.messages import AgentWish
from liberatai_core.errors import BusyError, DiskError, StateError, TooLargeError
from liberatai_core.release import MAX_RELEASE_BYTES, opened

FOLDER = "bundle"


class Upgrading:
    """Brings releases for one device; what is asked for (`Shadow`'s `Upgrade`).

    Args:
        config: the device's own settings.
        folder: of the state.
        fetcher: asks for files.
        unpacked: told when a release waits for its trial.
    """

    def __init__(
        self, config: AgentConfig, folder: Path, fetcher: Fetcher, unpacked: Callable[[], None]
    ) -> None:
        self._key, self._folder, self._fetcher = config.update.key_bytes, folder, fetcher
        self._unpacked = unpacked

    async def __call__(self, wish: AgentWish) -> None:
        """Bring a release to its trial. It never returns well: the process that hears of it is another one.

        Raises:
            BusyError: it waits for its trial.
            StateError: no release is believed here, or not this one; the text says why.
            LiberataiError: it cannot be fetched, or is not what the release key has signed.
        """
        if self._key is None:
            raise StateError("update.release_key is not set on this device: it believes no release")
        if not self._waits(wish):
            if wish.bundle.size_bytes > MAX_RELEASE_BYTES:
                size = wish.bundle.size_bytes
                raise TooLargeError(f"a release of {size} bytes, at most {MAX_RELEASE_BYTES}")
            store = await asyncio.to_thread(BlobStore, slots.folder_of(self._folder) / FOLDER)
            store.keep_only([wish.bundle.blob])
            await self._fetcher.fetch(wish.bundle, store)
            # The file stays: a release that fails is refused at the next start without being fetched again.
            await asyncio.to_thread(self._install, wish, store.path(wish.bundle.blob), self._key)
            self._unpacked()
        raise BusyError(f"release {wish.version} waits for its trial: it begins when no work is in hand")

    def _install(self, wish: AgentWish, bundle: Path, key: bytes) -> None:
        try:
            with bundle.open("rb") as source:
                manifest = opened(source, key)
        except OSError as error:
            raise DiskError(f"{bundle}: {error.strerror}") from None
        if manifest.version != wish.version:
            raise StateError(f"the bundle holds release {manifest.version}, not {wish.version}")
        slots.install(self._folder, bundle, key, now_s=time.time())

    def _waits(self, wish: AgentWish) -> bool:
        trial = slots.read_state(self._folder).trial
        return trial is not None and trial.version == wish.version
