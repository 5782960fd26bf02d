"""Who a device is: its private key, the number of its newest start, the highest epoch of each coordinator.

These must not be lost with anything else, and never go back. They stand in two small files that are written
in turn, each with a checksum: a write that is cut short, or a page that rots, costs one of the two. Both hold
a copy of the private key beside `device.key`, because a device with another key is a stranger to its
coordinator.

If one of the two is damaged it may have been the newer one, so the next number skips one more. If both are,
numbers begin again at 1 and the coordinator says how far they were (SessionSeen).
"""

import hashlib
import logging
import secrets
import stat
from pathlib import Path

import msgspec
from msgspec.structs import replace

from liberatai_agent.store.files import set_aside, write_durably
from liberatai_core.contract.frame import Signer, key_id
from liberatai_core.errors import ConfigError, DiskError

log = logging.getLogger(__name__)

KEY_FILE = "device.key"
SEED_BYTES = 32
CHECKSUM_BYTES = 32
MAX_FILE_BYTES = 8192
"""A record has some 150 bytes, and at most 1200 more for each coordinator."""
MAX_NUMBER = 2**53
"""What the protocol carries."""
MAX_COORDINATORS = 4
"""Keys whose epochs are remembered; the oldest are forgotten."""


class Fence(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What is known of a coordinator.

    Attributes:
        key: id of its public key.
        epoch: below which nothing of it is believed.
        word: frame of the presence with the highest epoch: it shows the coordinator how far it was.
    """

    key: bytes
    epoch: int
    word: bytes = b""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one of the two files holds.

    Attributes:
        writes: counts the writes: the file with the larger one is newer.
        device: whose it is.
        seed: private key.
        session: number of the newest start.
        fences: of the coordinators that the device had, the newest last.
    """

    writes: int
    device: str
    seed: bytes
    session: int
    fences: tuple[Fence, ...] = ()


_DECODER = msgspec.msgpack.Decoder(Record)


class Identity:
    """Reads and keeps a device's identity.

    Args:
        folder: of the device's state; made if missing.
        device: its name.
        fleet: it signs for.

    Attributes:
        signer: signs as the device.
        damaged: what was found damaged, one line each; it has been set aside or replaced.

    Raises:
        ConfigError: others may read the key.
        DiskError: a file cannot be read or written.
    """

    def __init__(self, folder: Path, device: str, fleet: str) -> None:
        self._folder, self._device = folder, device
        self._slots = tuple(folder / f"identity.{device}.{number}" for number in (0, 1))
        self.damaged: list[str] = []
        found = [record for record in map(self._read, self._slots) if record is not None]
        newest = max(found, key=lambda record: record.writes, default=None)
        self._skip = 1 if self.damaged else 0
        try:
            seed = self._seed(newest)
        except OSError as error:
            raise DiskError(f"{folder / KEY_FILE}: {error.strerror}") from error
        self.signer = Signer.from_seed(seed, fleet)
        self._record = newest or Record(writes=0, device=device, seed=seed, session=0)

    @property
    def session(self) -> int:
        """Number of the newest start."""
        return self._record.session

    def next_session(self) -> int:
        """Return a number larger than any before; it is on disk when this returns.

        Raises:
            DiskError: it cannot be stored.
        """
        self._write(replace(self._record, session=min(MAX_NUMBER, self.session + 1 + self._skip)))
        self._skip = 0
        return self.session

    def raise_session(self, known: int) -> None:
        """Let the next number be larger than one that was used before the folder lost its own.

        Raises:
            DiskError: it cannot be stored.
        """
        if known > self.session:
            self._write(replace(self._record, session=min(known, MAX_NUMBER)))

    def fence(self, coordinator_key: bytes) -> Fence:
        """Return what is known of the coordinator with this public key."""
        name = key_id(coordinator_key)
        found = [one for one in self._record.fences if one.key == name]
        return found[0] if found else Fence(key=name, epoch=0)

    def set_fence(self, coordinator_key: bytes, epoch: int, word: bytes = b"") -> None:
        """Store the epoch below which nothing of this coordinator is believed.

        Args:
            coordinator_key: its public key.
            epoch: highest seen.
            word: frame of the presence that said so; empty: the one that is known stays.

        Raises:
            DiskError: it cannot be stored.
        """
        before = self.fence(coordinator_key)
        now = replace(before, epoch=epoch, word=word or before.word)
        if now != before:
            others = tuple(one for one in self._record.fences if one.key != now.key)
            self._write(replace(self._record, fences=(*others, now)[-MAX_COORDINATORS:]))

    def _read(self, path: Path) -> Record | None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error
        record = _checked(content)
        if record is None or record.device != self._device or len(record.seed) != SEED_BYTES:
            self._note(f"{path.name}: damaged, replaced")
            return None
        return record

    def _write(self, record: Record) -> None:
        record = replace(record, writes=record.writes + 1)
        body = msgspec.msgpack.encode(record)
        path = self._slots[record.writes % 2]
        try:
            write_durably(path, hashlib.sha256(body).digest() + body)
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error
        self._record = record

    def _seed(self, newest: Record | None) -> bytes:
        """Return the private key: of the file, or of its copy if the file is missing or another one."""
        path = self._folder / KEY_FILE
        try:
            seed, mode = path.read_bytes()[: SEED_BYTES + 1], path.stat().st_mode
        except FileNotFoundError:
            seed, mode = b"", 0
        if seed and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(str(path), ["others may read this private key: chmod 600 it, or replace it"])
        wanted = seed if newest is None else newest.seed
        if len(seed) == SEED_BYTES and seed == wanted:
            return seed
        if seed:
            aside = set_aside(path)
            self._note(f"{KEY_FILE}: damaged, set aside as {aside.name}")
        if len(wanted) != SEED_BYTES:
            wanted = secrets.token_bytes(SEED_BYTES)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, wanted)
        return wanted

    def _note(self, what: str) -> None:
        log.warning("E_DAMAGED: %s", what)
        self.damaged.append(what)


def _checked(content: bytes) -> Record | None:
    body = content[CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != content[:CHECKSUM_BYTES]:
        return None
    try:
        return _DECODER.decode(body)
    except msgspec.MsgspecError:
        return None
