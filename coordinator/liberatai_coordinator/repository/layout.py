"""An OCI image layout on disk (image spec 1.1): blobs by digest, and one index with the references.

A blob is written beside its place, synced, renamed, and the folder synced: complete or absent after any
crash. References change under a lock: read, compared with what the caller expects, written beside, renamed.
So several processes may write; who loses a race for a reference is told. `writing` keeps the collector away:
what was put but is named by nothing yet is not removed.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from liberatai_coordinator.repository.descriptors import (
    INDEX,
    MAX_BLOB_BYTES,
    MAX_JSON_BYTES,
    REF,
    Descriptor,
    Index,
    decode,
    encode,
)
from liberatai_coordinator.repository.names import require_digest
from liberatai_core.errors import (
    ConfigError,
    DigestError,
    DiskError,
    LiberataiError,
    NotFoundError,
    TooLargeError,
)

VERSION: Final = b'{"imageLayoutVersion":"1.0.0"}'
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
PART_BYTES: Final = 256 * 1024
_TEMPORARY: Final = ".tmp"

Refs = Mapping[str, Descriptor]
"""Name -> what it names."""


class Layout:
    """Blobs and references below one folder. Safe for threads and processes."""

    def __init__(self, folder: Path) -> None:
        """Make the folder a layout if it is none.

        Raises:
            ConfigError: the folder is a layout of another version.
            DiskError: the disk refuses.
        """
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        marker = folder / "oci-layout"
        with _disk(folder):
            self._blobs.mkdir(parents=True, exist_ok=True)
            if marker.is_file():
                # Written in any spelling by any program; only the version counts.
                found = decode(marker.read_bytes()[:4096], dict[str, str], str(marker))
                if found.get("imageLayoutVersion") != "1.0.0":
                    raise ConfigError(str(marker), ["an OCI layout of another version than 1.0.0"])
                return
            with self._locked("lock"):
                if not (folder / "index.json").exists():
                    self._write_index(())
                if not marker.exists():
                    write_atomically(marker, VERSION)

    # --- blobs ---------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Return where a blob is or would be, or raise SchemaError."""
        return self._blobs / require_digest(digest).removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Whether a blob is there (its content is checked when it is read)."""
        return self.path(digest).is_file()

    def put(self, contents: Sequence[bytes]) -> list[str]:
        """Store blobs durably, together; storing one again is cheap, and repairs a damaged one.

        Returns:
            Their digests, in order.

        Raises:
            DiskError: not all are stored.
        """
        digests = [f"sha256:{hashlib.sha256(content).hexdigest()}" for content in contents]
        self.put_named(dict(zip(digests, contents, strict=True)))
        return digests

    def put_named(self, blobs: Mapping[str, bytes], beside: Mapping[Path, bytes] | None = None) -> None:
        """Store blobs of which the caller knows the digests, as `put` does; other files along with them."""
        wanted = {self.path(digest): content for digest, content in blobs.items()}
        missing = {path: content for path, content in wanted.items() if not _holds(path, content)}
        write_all({**missing, **(beside or {})})

    def put_stream(self, parts: Iterable[bytes], wanted: Descriptor) -> None:
        """Store a blob that comes in parts, if it is the one that was wanted.

        Raises:
            DigestError, TooLargeError: it is another one; nothing is stored.
            DiskError: the disk refuses.
        """

        def counted() -> Iterator[bytes]:
            taken, sha = 0, hashlib.sha256()
            for part in parts:
                taken += len(part)
                if taken > wanted.size:
                    raise TooLargeError(f"blob {wanted.digest}: longer than the {wanted.size} bytes it has")
                sha.update(part)
                yield part
            if taken != wanted.size or sha.hexdigest() != wanted.sha:
                raise DigestError(f"blob {wanted.digest}: what came ({taken} bytes) has another digest")

        path = self.path(wanted.digest)
        with _disk(self._blobs):
            self._beside(path, counted()).replace(path)
            sync_folder(self._blobs)

    def link(self, source: Path, wanted: Descriptor) -> bool:
        """Take over a blob from another folder of this disk without a copy; False: not possible."""
        path = self.path(wanted.digest)
        if path.is_file():
            return True
        beside = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}{_TEMPORARY}")
        try:
            os.link(source, beside)
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            return False
        return True

    def get(self, digest: str, *, limit: int = MAX_BLOB_BYTES) -> bytes:
        """Return a blob, verified.

        Raises:
            NotFoundError: no such blob.
            TooLargeError: it is longer than `limit`.
            DigestError: the file is damaged; the text names it.
            DiskError: the disk refuses.
        """
        with self.opened(digest) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise TooLargeError(f"blob {digest}: {size} bytes, at most {limit} here")
            content = file.read(limit + 1)
        if hashlib.sha256(content).hexdigest() != digest.removeprefix("sha256:"):
            raise self._damaged(digest)
        return content

    def json(self, digest: str) -> bytes:
        """Return a manifest or config, verified; at most 4 MiB."""
        return self.get(digest, limit=MAX_JSON_BYTES)

    @contextmanager
    def opened(self, digest: str) -> Iterator[BinaryIO]:
        """Open a blob; what is read is not verified.

        Raises:
            NotFoundError: no such blob. DiskError: the disk refuses.
        """
        path = self.path(digest)
        with _disk(path):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                raise NotFoundError(f"blob {digest}: not in {self.folder}") from None
            with file:
                yield file

    def check(self, digest: str) -> int:
        """Read a blob in bounded memory and verify it; returns its length.

        Raises:
            NotFoundError, DigestError, DiskError: it is absent, damaged, or cannot be read.
        """
        sha, size = hashlib.sha256(), 0
        with self.opened(digest) as file:
            while part := file.read(PART_BYTES):
                sha.update(part)
                size += len(part)
        if sha.hexdigest() != digest.removeprefix("sha256:"):
            raise self._damaged(digest)
        return size

    def blobs(self) -> list[str]:
        """Return the digests of all blobs that are there."""
        with _disk(self._blobs):
            names = sorted(entry.name for entry in os.scandir(self._blobs))
        return [f"sha256:{name}" for name in names if len(name) == 64 and not name.endswith(_TEMPORARY)]

    def remove(self, digests: Iterable[str]) -> int:
        """Remove blobs, and what crashes left half written; only inside `alone`. Returns the bytes freed.

        Raises:
            DiskError: the disk refuses.
        """
        freed = 0
        with _disk(self._blobs):
            for path in [*map(self.path, digests), *self._blobs.glob(f"*{_TEMPORARY}")]:
                with suppress(FileNotFoundError):
                    freed += path.stat().st_size
                    path.unlink()
            sync_folder(self._blobs)
        return freed

    def _damaged(self, digest: str) -> DigestError:
        return DigestError(
            f"{self.path(digest)} is damaged: its content does not have the digest of its name; "
            "fetch or commit it again, or restore a backup"
        )

    def _beside(self, path: Path, parts: Iterable[bytes]) -> Path:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name[:64]}.", suffix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for part in parts:
                    _write_all(file.fileno(), part)
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        return Path(name)

    # --- references ------------------------------------------------------------------------------

    def refs(self) -> dict[str, Descriptor]:
        """Return what every reference names.

        Raises:
            SchemaError, DiskError: the index cannot be read.
        """
        path = self.folder / "index.json"
        with _disk(path):
            content = path.read_bytes()
        index = decode(content, Index, str(path), limit=MAX_INDEX_BYTES)
        return {one.note(REF): one for one in index.manifests if one.note(REF)}

    def update(self, decide: Callable[[dict[str, Descriptor]], Refs]) -> None:
        """Change references: `decide` gets those of now and returns those to be; no other process does.

        Raises:
            StateError: whatever `decide` raises, e.g. a lost race; nothing is changed.
            NotFoundError: a reference to a blob that is not here.
            DiskError: the disk refuses; nothing is changed.
        """
        with self._locked("lock"):
            before = self.refs()
            after = decide(dict(before))
            for name, one in after.items():
                if not self.has(one.digest):
                    raise NotFoundError(f"{name}: {one.digest} is not in {self.folder}")
            if after != before:
                named = [with_ref(one, name) for name, one in sorted(after.items())]
                self._write_index(named)

    def _write_index(self, manifests: Sequence[Descriptor]) -> None:
        index = Index(schema_version=2, media_type=INDEX, manifests=tuple(manifests))
        write_atomically(self.folder / "index.json", encode(index))

    # --- locks -----------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the collector away while blobs are put that nothing names yet."""
        with self._locked("collect.lock", shared=True):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody writes, and let nobody begin."""
        with self._locked("collect.lock"):
            yield

    @contextmanager
    def _locked(self, name: str, *, shared: bool = False) -> Iterator[None]:
        path = self.folder / name
        with _disk(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def with_ref(one: Descriptor, name: str) -> Descriptor:
    """Return a descriptor under a name."""
    return Descriptor(
        media_type=one.media_type,
        digest=one.digest,
        size=one.size,
        annotations={**(one.annotations or {}), REF: name},
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, sync it, move it there, sync the folder.

    Raises:
        DiskError: the disk refuses; the old file stays.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places; once all are on the disk, move them there, in order; sync the folders.

    Raises:
        DiskError: the disk refuses; files that were there stay.
    """
    beside: dict[Path, Path] = {}
    folder = next(iter(contents), Path()).parent
    with _disk(folder):
        try:
            for path, content in contents.items():
                handle, name = tempfile.mkstemp(
                    dir=path.parent, prefix=f"{path.name[:64]}.", suffix=_TEMPORARY
                )
                beside[path] = Path(name)
                try:
                    _write_all(handle, content)
                finally:
                    os.close(handle)
            for written in beside.values():  # the first one takes most of the others along
                _sync(written, os.O_RDONLY)
            for path, written in beside.items():
                written.replace(path)
        except BaseException:
            for written in beside.values():
                with suppress(OSError):
                    written.unlink()
            raise
        for parent in {path.parent for path in contents}:
            sync_folder(parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, part: bytes) -> None:
    view = memoryview(part)
    while view:
        view = view[os.write(handle, view) :]


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except LiberataiError:
        raise
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}; free space or check the disk") from error
