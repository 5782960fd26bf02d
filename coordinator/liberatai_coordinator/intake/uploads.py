"""Uploads that are too long for one message: offer, credit, chunks. Pure: time is an argument.

The credit names what is there already, so an upload goes on after any crash on either side. Memory grows
only with bytes that arrived, and is bounded per device and for all devices together; what nobody goes on
with is let go.
"""

from dataclasses import dataclass, field

from liberatai_core.contract.chunks import Assembly
from liberatai_core.contract.limits import CHUNK_BYTES, OFFERS_PER_DEVICE, WINDOW_CHUNKS
from liberatai_core.contract.messages import Credit, Offer
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import BusyError, DigestError, QuotaError

TOTAL_BYTES = 256 * 1024 * 1024
"""Of all uploads under way: four of the largest updates, or five hundred whose first window has come."""
MAX_OPEN = 4096
"""Uploads under way: each takes some memory before its first byte."""
IDLE_S = 600.0
"""After which an upload is let go. A device repeats its offer every 2 minutes at most; it starts anew."""


@dataclass(slots=True)
class Upload:
    """One upload under way.

    Attributes:
        touched_s: when its device last did something about it.
        uncredited: chunks that came since the last credit.
    """

    assembly: Assembly
    touched_s: float
    uncredited: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Uploads:
    """All uploads under way, by device and transfer.

    Attributes:
        max_bytes: of one upload.
        total_bytes: of what may have arrived of all of them.
    """

    max_bytes: int
    total_bytes: int = TOTAL_BYTES
    open: dict[tuple[str, str], Upload] = field(default_factory=dict)
    _of_device: dict[str, list[str]] = field(default_factory=dict)
    _arrived_bytes: int = 0

    def offer(self, offer: Offer, now_s: float) -> Credit:
        """Take an offer, new or repeated, and say what may come.

        Raises:
            QuotaError: larger than an update can be. (A third upload displaces the device's oldest.)
            BusyError: too much is under way: the device tries again later.
        """
        key = (offer.device, offer.transfer)
        if offer.size_bytes > self.max_bytes:
            raise QuotaError(f"upload of {offer.size_bytes} bytes, at most {self.max_bytes}")
        known = self.open.get(key)
        if known is not None and known.assembly.chunk_bytes != offer.chunk_bytes:
            self.drop(key)  # cut anew: its broker takes only smaller pieces
        if key not in self.open:
            self._make_room(offer, now_s)
            assembly = Assembly(
                size_bytes=offer.size_bytes, chunk_bytes=offer.chunk_bytes, sha256=offer.sha256
            )
            self.open[key] = Upload(assembly=assembly, touched_s=now_s)
            self._of_device.setdefault(offer.device, []).append(offer.transfer)
        self.open[key].uncredited = 0
        self.open[key].touched_s = now_s
        return self._credit(key)

    def chunk(
        self, device: str, transfer: str, part: int, data: bytes, now_s: float
    ) -> Credit | bytes | None:
        """Take a chunk: the whole content once complete, a credit when the window is used up, or None.

        Raises:
            SchemaError: no such chunk, or of a wrong length.
            DigestError: the content is not what was offered; the upload starts again.
        """
        key = (device, transfer)
        upload = self.open.get(key)
        if upload is None:
            return None  # a chunk after a restart: the device repeats its offer
        if upload.assembly.add(part, data):
            upload.size_bytes += len(data)
            self._arrived_bytes += len(data)
        upload.touched_s = now_s
        upload.uncredited += 1
        if upload.assembly.complete:
            self.drop(key)
            content = upload.assembly.join()
            if blob_id(content) != transfer:
                raise DigestError("the transfer is not named after its content")
            return content
        if upload.uncredited >= WINDOW_CHUNKS:
            upload.uncredited = 0
            return self._credit(key)
        return None

    def drop(self, key: tuple[str, str]) -> None:
        """Forget an upload."""
        upload = self.open.pop(key, None)
        if upload is not None:
            self._arrived_bytes -= upload.size_bytes
            device, transfer = key
            self._of_device[device].remove(transfer)
            if not self._of_device[device]:
                del self._of_device[device]

    def expire(self, now_s: float) -> None:
        """Let uploads go that nobody went on with."""
        for key in [key for key, upload in self.open.items() if now_s - upload.touched_s > IDLE_S]:
            self.drop(key)

    def _make_room(self, offer: Offer, now_s: float) -> None:
        mine = self._of_device.get(offer.device, [])
        if len(mine) >= OFFERS_PER_DEVICE:
            self.drop((offer.device, mine[0]))  # the oldest one: a restarted device never finishes it
        window = min(offer.size_bytes, WINDOW_CHUNKS * CHUNK_BYTES)
        if len(self.open) >= MAX_OPEN or self._arrived_bytes + window > self.total_bytes:
            self.expire(now_s)
        if len(self.open) >= MAX_OPEN or self._arrived_bytes + window > self.total_bytes:
            raise BusyError(f"{len(self.open)} uploads are under way: try again later")

    def _credit(self, key: tuple[str, str]) -> Credit:
        have = self.open[key].assembly.bitmap()
        return Credit(device=key[0], transfer=key[1], have=have, chunks=WINDOW_CHUNKS)
