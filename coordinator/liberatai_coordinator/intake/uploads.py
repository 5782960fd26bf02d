"""Uploads that are too long for one message: offer, credit, chunks. Pure.

The credit names what is there already, so an upload goes on after any crash on either side. Memory is
bounded per device and grows only with bytes that arrived.
"""

from dataclasses import dataclass, field

from liberatai_core.contract.chunks import Assembly
from liberatai_core.contract.limits import OFFERS_PER_DEVICE, WINDOW_CHUNKS
from liberatai_core.contract.messages import Credit, Offer
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import DigestError, QuotaError


@dataclass(slots=True)
class Uploads:
    """All uploads under way, by device and transfer."""

    max_bytes: int
    open: dict[tuple[str, str], Assembly] = field(default_factory=dict)
    since_credit: dict[tuple[str, str], int] = field(default_factory=dict)

    def offer(self, offer: Offer) -> Credit:
        """Take an offer, new or repeated, and say what may come.

        Raises:
            QuotaError: larger than an update can be. (A third upload displaces the device's oldest.)
        """
        key = (offer.device, offer.transfer)
        if offer.size_bytes > self.max_bytes:
            raise QuotaError(f"upload of {offer.size_bytes} bytes, at most {self.max_bytes}")
        known = self.open.get(key)
        if known is not None and known.chunk_bytes != offer.chunk_bytes:
            self.drop(key)  # cut anew: its broker takes only smaller pieces
        if key not in self.open:
            mine = [other for other in self.open if other[0] == offer.device]
            if len(mine) >= OFFERS_PER_DEVICE:
                self.drop(mine[0])  # the oldest one: a restarted device never finishes it
            self.open[key] = Assembly(
                size_bytes=offer.size_bytes, chunk_bytes=offer.chunk_bytes, sha256=offer.sha256
            )
        self.since_credit[key] = 0
        return self._credit(key)

    def chunk(self, device: str, transfer: str, part: int, data: bytes) -> Credit | bytes | None:
        """Take a chunk: the whole content once complete, a credit when the window is used up, or None.

        Raises:
            SchemaError: no such chunk, or of a wrong length.
            DigestError: the content is not what was offered; the upload starts again.
        """
        key = (device, transfer)
        assembly = self.open.get(key)
        if assembly is None:
            return None  # a chunk after a restart: the device repeats its offer
        assembly.add(part, data)
        self.since_credit[key] += 1
        if assembly.complete:
            self.drop(key)
            content = assembly.join()
            if blob_id(content) != transfer:
                raise DigestError("the transfer is not named after its content")
            return content
        if self.since_credit[key] >= WINDOW_CHUNKS:
            self.since_credit[key] = 0
            return self._credit(key)
        return None

    def drop(self, key: tuple[str, str]) -> None:
        """Forget an upload."""
        self.open.pop(key, None)
        self.since_credit.pop(key, None)

    def _credit(self, key: tuple[str, str]) -> Credit:
        return Credit(device=key[0], transfer=key[1], have=self.open[key].bitmap(), chunks=WINDOW_CHUNKS)
