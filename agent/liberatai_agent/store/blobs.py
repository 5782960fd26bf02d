"""Blobs: content-addressed files of models, fetched from retained messages, resumable after any crash.

A blob is asked for by its exact topics only, each unsubscribed when its content is on disk. One that fits
a message is its own chunk 0; of a longer one the manifest comes first, then at most WINDOW_CHUNKS chunks at
once over all blobs. A short one comes in chunks, too, if the broker takes only smaller messages; its chunk 0
shows that. What is there after a crash is not asked for again. A file carries its final name only
when its SHA-256 gives its id.
"""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from liberatai_agent.store.files import sync_folder, write_durably
from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Keys, encode_spec, expect
from liberatai_core.contract.limits import MAX_CHAIN, MAX_SINGLE_BYTES, WINDOW_CHUNKS
from liberatai_core.contract.messages import BlobManifest, BlobRef, Step, TaskSpec
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import (
    DigestError,
    DiskError,
    FrameError,
    LiberataiError,
    NotFoundError,
    ProtocolVersionError,
    SchemaError,
    SignatureError,
    TooLargeError,
    UnknownDeviceError,
)
from liberatai_core.link.link import Link, Received

MESSAGE_TIMEOUT_S = 60.0
"""A retained message comes at once; a minute is a broken transfer, or a blob that is not there."""
SYNC_EVERY_CHUNKS = 8
"""1 MiB: what a power cut may cost, against wear of the card."""
MIN_CHUNK_BYTES = 1024
"""No blob is cut smaller (see `BlobManifest`); what is shorter and not the whole is nothing."""
_UNBELIEVED = (
    FrameError,
    TooLargeError,
    ProtocolVersionError,
    UnknownDeviceError,
    SignatureError,
    SchemaError,
    DigestError,
)
"""Somebody else's words on a blob's topic: counted, and the right ones are waited for."""
Answer = TypeVar("Answer")
_MAP = ".map"
_PART = ".part"
_PATH, _SPEC = "path.msgpack", "model.spec"
_PATH_BYTES = 128 * MAX_CHAIN
"""A step takes some 60 bytes."""
_STEPS = msgspec.msgpack.Decoder(tuple[Step, ...])


class _CutError(Exception):
    """A blob that would fit one message comes in pieces, or from a liar: its manifest will tell."""


class BlobStore:
    """The folder with complete blobs and unfinished ones.

    Raises:
        DiskError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec = b""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from error

    def path(self, blob: str) -> Path:
        """Return where a complete blob lies."""
        return self._folder / blob

    def size_bytes(self) -> int:
        """Return what the files here take, unfinished ones included."""
        sizes = []
        with contextlib.suppress(OSError):
            sizes = [entry.stat().st_size for entry in os.scandir(self._folder)]
        return sum(sizes)

    def has(self, ref: BlobRef) -> bool:
        """Whether a blob is complete."""
        try:
            return self.path(ref.blob).stat().st_size == ref.size_bytes
        except OSError:
            return False

    def put(self, ref: BlobRef, content: bytes) -> None:
        """Store a whole blob.

        Raises:
            DigestError: the content is not what the id names.
            DiskError: the disk refuses.
        """
        require_content(ref, content)
        with _disk(ref.blob):
            write_durably(self.path(ref.blob), content, mode=0o600)

    def keep_only(self, blobs: Iterable[str]) -> None:
        """Delete all other blobs, complete or not."""
        kept = {name for blob in blobs for name in (blob, blob + _PART, blob + _MAP)}
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def read(self, blob: str, limit: int) -> bytes:
        """Return a small blob; a damaged file is deleted, so that it is fetched again.

        Raises:
            NotFoundError: not here, or longer than `limit`.
            DigestError: the file is damaged.
        """
        path = self.path(blob)
        try:
            with path.open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise NotFoundError(f"blob {blob}: {error.strerror}") from error
        if len(content) > limit:
            raise NotFoundError(f"blob {blob}: longer than {limit} bytes")
        if blob_id(content) != blob:
            with _disk(blob):
                path.unlink(missing_ok=True)
            raise DigestError(f"blob {blob}: the file is damaged")
        return content

    def remember_path(self, path: tuple[Step, ...], spec: TaskSpec | None = None) -> None:
        """Store durably which blobs, in which order, lead to the weights that the device holds.

        Args:
            path: the blobs.
            spec: what they are weights of, for who uses the model (`liberatai_core.model`); None: as before.

        Raises:
            DiskError: the disk refuses.
        """
        if spec is not None and (content := encode_spec(spec)) != self._spec:
            with _disk(_SPEC):
                write_durably(self._folder.parent / _SPEC, content, mode=0o600)
            self._spec = content
        with _disk(_PATH):
            write_durably(self._folder.parent / _PATH, msgspec.msgpack.encode(path), mode=0o600)

    def recall_path(self) -> tuple[Step, ...]:
        """Return what `remember_path` stored, up to the first blob that is not here any more."""
        try:
            with (self._folder.parent / _PATH).open("rb") as file:
                stored = _STEPS.decode(file.read(_PATH_BYTES))
        except (OSError, msgspec.MsgspecError):
            return ()
        return tuple(itertools.takewhile(lambda step: self.has(step.blob), stored))

    def partial(self, ref: BlobRef, chunk_bytes: int) -> "PartialBlob":
        """Open what is there of a blob that comes in chunks."""
        return PartialBlob(self._folder, ref, chunk_bytes)


class PartialBlob:
    """A blob that is arriving: a file of its final size, and a bitmap of the chunks in it."""

    def __init__(self, folder: Path, ref: BlobRef, chunk_bytes: int) -> None:
        self._ref, self._chunk_bytes = ref, chunk_bytes
        self._part, self._map = folder / (ref.blob + _PART), folder / (ref.blob + _MAP)
        self._final = folder / ref.blob
        self.chunks = chunks.count(ref.size_bytes, chunk_bytes)
        self._have = self._read_map()
        self._unsynced: set[int] = set()

    def _read_map(self) -> set[int]:
        head = self._head()
        with contextlib.suppress(OSError):
            bitmap = self._map.read_bytes()
            whole = self._part.stat().st_size == self._ref.size_bytes
            if whole and bitmap[: len(head)] == head:
                lacking = chunks.missing(bitmap[len(head) :], self.chunks)
                return set(range(self.chunks)) - set(lacking)
        return set()

    def _head(self) -> bytes:
        # Another cut of the same blob has other chunks under the same numbers.
        return self._chunk_bytes.to_bytes(4, "little")

    def missing(self) -> list[int]:
        """Return the numbers of the chunks that are not here."""
        return [n for n in range(self.chunks) if n not in self._have and n not in self._unsynced]

    def add(self, number: int, data: bytes) -> None:
        """Write one chunk; it is durable after `sync`.

        Raises:
            SchemaError: not of the length that this chunk must have.
            DiskError: the disk refuses.
        """
        wanted = min(self._chunk_bytes, self._ref.size_bytes - number * self._chunk_bytes)
        if len(data) != wanted:
            raise SchemaError(f"chunk {number}: {len(data)} bytes, wanted {wanted}")
        with _disk(self._ref.blob):
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(descriptor).st_size != self._ref.size_bytes:
                    os.ftruncate(descriptor, self._ref.size_bytes)
                view = memoryview(data)
                at = number * self._chunk_bytes
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
                self._unsynced.add(number)
                if len(self._unsynced) >= SYNC_EVERY_CHUNKS:
                    os.fsync(descriptor)
                    self._write_map()
            finally:
                os.close(descriptor)

    def writer(self, number: int) -> Callable[[bytes], None]:
        """Return a function that adds chunk `number`."""
        return lambda data: self.add(number, data)

    def _write_map(self) -> None:
        self._have |= self._unsynced
        self._unsynced.clear()
        bits = bytearray(-(-self.chunks // 8))
        for number in self._have:
            bits[number // 8] |= 1 << (number % 8)
        write_durably(self._map, self._head() + bytes(bits), mode=0o600)

    def finish(self) -> None:
        """Check the whole content and give it its name.

        Raises:
            DigestError: wrong content; everything is deleted, the transfer starts over.
            DiskError: the disk refuses.
        """
        with _disk(self._ref.blob):
            with self._part.open("rb") as file:
                os.fsync(file.fileno())
                found = hashlib.file_digest(file, "sha256").digest()
            if not _names(self._ref.blob, found):
                self._part.unlink(missing_ok=True)
                self._map.unlink(missing_ok=True)
                self._have.clear()
                self._unsynced.clear()
                raise DigestError(f"blob {self._ref.blob}: the chunks do not give its content")
            self._part.replace(self._final)
            self._map.unlink(missing_ok=True)
            sync_folder(self._final.parent)


def require_content(ref: BlobRef, content: bytes) -> None:
    """Raise DigestError unless the content has the size and the name that the reference says."""
    if len(content) != ref.size_bytes or blob_id(content) != ref.blob:
        raise DigestError(f"blob {ref.blob}: the content is not what its id names")


class Fetcher:
    """Fetches blobs over a link. `deliver` gets every message of a blob topic.

    Args:
        link: gives where to ask now.
        topics: of the fleet.
        keys: the coordinator's key, for manifests.
        store: where they go.
        refused: called with the code and text of each message that was not believed.
    """

    def __init__(
        self,
        link: Callable[[], Link],
        topics: Topics,
        keys: Keys,
        store: BlobStore,
        refused: Callable[[str, str], None],
        *,
        timeout_s: float = MESSAGE_TIMEOUT_S,
    ) -> None:
        self._link, self._topics, self._keys, self._store = link, topics, keys, store
        self._refused, self._timeout_s = refused, timeout_s
        self._waiting: dict[str, asyncio.Queue[Received]] = {}
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self._window = asyncio.Semaphore(WINDOW_CHUNKS)

    def deliver(self, message: Received) -> None:
        """Take one message of a blob topic; what nobody waits for is dropped."""
        queue = self._waiting.get(message.topic)
        if queue is None or queue.full():
            self._link().ack(message.token)
        else:
            queue.put_nowait(message)

    async def fetch(self, ref: BlobRef, store: BlobStore | None = None) -> None:
        """Bring a blob to the disk, verified; returns at once if it is there.

        Args:
            ref: it.
            store: where it goes; None: to the files of training.

        Raises:
            NotFoundError: the broker does not have it (yet).
            DigestError: what the broker has is something else.
            DiskError, LinkError: for now.
        """
        async with self._turn(ref.blob):  # messages of a topic go to one who waits
            await self._bring(ref, store or self._store)

    async def _bring(self, ref: BlobRef, store: BlobStore) -> None:
        if store.has(ref):
            return
        if ref.size_bytes <= MAX_SINGLE_BYTES:
            manifest = await self._single(ref, store)
            if manifest is None:
                return
        else:
            async with self._window:
                manifest = await self._manifest(ref)
        partial = store.partial(ref, manifest.chunk_bytes)
        await self._chunks(ref, partial)
        await asyncio.to_thread(partial.finish)

    @contextlib.asynccontextmanager
    async def _turn(self, blob: str) -> AsyncIterator[None]:
        lock, users = self._turns.get(blob, (asyncio.Lock(), 0))
        self._turns[blob] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns[blob]
            if users > 1:
                self._turns[blob] = lock, users - 1
            else:
                del self._turns[blob]

    async def _chunks(self, ref: BlobRef, partial: PartialBlob) -> None:
        numbers = iter(partial.missing())

        async def work() -> None:
            for number in numbers:
                async with self._window:
                    await self._ask(self._topics.blob(ref.blob, number), partial.writer(number))

        workers = [asyncio.create_task(work()) for _ in range(WINDOW_CHUNKS)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _single(self, ref: BlobRef, store: BlobStore) -> BlobManifest | None:
        """Fetch a blob in one message; a manifest: it was cut, for a broker that takes only smaller ones."""
        is_cut = asyncio.Event()

        def keep(payload: bytes) -> None:
            if MIN_CHUNK_BYTES <= len(payload) < ref.size_bytes:
                is_cut.set()
                raise _CutError
            store.put(ref, payload)

        async def cut() -> BlobManifest | None:
            await is_cut.wait()
            return await self._manifest(ref)

        async with self._window:
            whole = asyncio.create_task(self._ask(self._topics.blob(ref.blob, 0), keep))
            pieces = asyncio.create_task(cut())
            try:
                await asyncio.wait({whole, pieces}, return_when=asyncio.FIRST_COMPLETED)
                if whole.done() and not (whole.exception() is not None and is_cut.is_set()):
                    await whole
                    return None
                return await pieces
            finally:
                whole.cancel()
                pieces.cancel()
                await asyncio.gather(whole, pieces, return_exceptions=True)

    async def _manifest(self, ref: BlobRef) -> BlobManifest:
        def read(payload: bytes) -> BlobManifest:
            manifest = expect(payload, BlobManifest, self._topics.fleet, self._keys)
            if manifest.blob != ref.blob or manifest.size_bytes != ref.size_bytes:
                raise DigestError(f"manifest of {manifest.blob}, {manifest.size_bytes} bytes: not {ref.blob}")
            return manifest

        return await self._ask(self._topics.blob(ref.blob), read)

    async def _ask(self, topic: str, read: Callable[[bytes], Answer]) -> Answer:
        """Subscribe to one topic until `read` accepts what comes."""
        queue: asyncio.Queue[Received] = asyncio.Queue(maxsize=2)
        self._waiting[topic] = queue
        try:
            await self._link().subscribe(topic)
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await queue.get()
                    try:
                        return read(message.payload)
                    except _CutError:
                        continue
                    except _UNBELIEVED as error:
                        if message.payload:
                            self._refused(error.code, f"{topic}: {error}")
                    finally:
                        self._link().ack(message.token)
        except TimeoutError:
            raise NotFoundError(f"{topic}: nothing (credible) came within {self._timeout_s:g} s") from None
        finally:
            # A cancelled request may have been followed by another one for the same topic already.
            if self._waiting.get(topic) is queue:
                del self._waiting[topic]
                with contextlib.suppress(LiberataiError):
                    await self._link().unsubscribe(topic)


def _names(blob: str, sha256: bytes) -> bool:
    return base64.b32encode(sha256)[:26].decode().lower() == blob


@contextlib.contextmanager
def _disk(blob: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"blob {blob}: {error.strerror}") from error
