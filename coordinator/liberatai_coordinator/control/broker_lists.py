"""The broker's access list and its revoked certificates, as the fleet wants them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liberatai_coordinator.authority import broker_files
from liberatai_coordinator.authority.authority import Authority
from liberatai_core.errors import NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLists:
    """Writes the lists; whoever watches `reload` in the broker's folder lets it read them.

    Attributes:
        folder: that the broker reads; None: it is elsewhere.
        authority: folder of the fleet's authority; None: certificates come from elsewhere.
        fleet, coordinator: names in the access list.
        written: called after each change, beside the stamp.
    """

    folder: Path | None
    authority: Path | None
    fleet: str
    coordinator: str
    written: Callable[[], None] = lambda: None

    async def __call__(self, shut_out: frozenset[str], revoked: str, reason: str) -> None:
        """Deny devices everything, then revoke the certificates of one of them.

        Args:
            shut_out: devices that may do nothing.
            revoked: whose certificates end; "": nobody's.
            reason: why.

        Raises:
            LiberataiError: something cannot be written.
        """
        await asyncio.to_thread(self._write, shut_out, revoked, reason)

    def _write(self, shut_out: frozenset[str], revoked: str, reason: str) -> None:
        self._sync(shut_out)  # first, because the connection that is open knows no revoked certificates
        if revoked and self.authority is not None:
            try:
                Authority(self.authority).revoke(revoked, reason)
            except NotFoundError:
                return  # it never had a certificate of ours
            self._sync(shut_out)

    def _sync(self, shut_out: frozenset[str]) -> None:
        if self.folder is None:
            return
        authority = None if self.authority is None else Authority(self.authority)
        if broker_files.sync(self.folder, authority, self.fleet, self.coordinator, shut_out):
            self.written()
