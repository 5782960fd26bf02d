"""The model repository: content-addressed blobs on disk, and the manifest that makes them a version.

A blob is a file named by its SHA-256. It is written beside its place, synced, renamed and the folder
synced, so it is complete or absent after any crash. A version is a manifest that names its blobs; the
id of a version is the SHA-256 of its manifest, so it depends on content only: the same updates give the
same id, whenever they are aggregated. `commit` stores the blobs before the manifest; the ledger's row,
added after it, is what makes the version exist (promise P3). A variant (a structure and a compression
setting, made from a version) is stored in the same way: its file, its manifest, the ledger's row.

The folder has the blob layout of an OCI image (`blobs/sha256/<hex>`, OCI image layout 1.0).
"""

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from liberatai_coordinator.store.manifests import (
    SHA256,
    Manifest,
    StepRecord,
    VariantManifest,
    encode_manifest,
    version_id,
)
from liberatai_core.errors import DigestError, DiskError, NotFoundError

_SHA256 = re.compile(SHA256)
_TEMPORARY: Final = ".tmp"


class Repository:
    """Blobs below one folder. Safe for several threads; one process at a time (the ledger locks it)."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is not there, and remove what a crash left half written.

        Raises:
            DiskError: the disk refuses.
        """
        self.folder = folder
        self._lock = threading.Lock()
        self._held: list[set[str]] = []
        self._blobs = folder / "blobs" / "sha256"
        with _disk(self._blobs):
            self._blobs.mkdir(parents=True, exist_ok=True)
            for left in self._blobs.glob(f"*{_TEMPORARY}"):
                left.unlink(missing_ok=True)

    def put(self, content: bytes) -> str:
        """Store a blob durably; storing it again is cheap and repairs a damaged file.

        Returns:
            Its SHA-256 (hex).

        Raises:
            DiskError: not stored; the disk is full or refuses.
        """
        return self.put_all([content])[0]

    def put_all(self, contents: Sequence[bytes]) -> list[str]:
        """Store blobs durably, together: the disk is waited for once, not twice for each of them.

        Returns:
            Their SHA-256 (hex), in order.

        Raises:
            DiskError: not all are stored; the disk is full or refuses.
        """
        shas = [hashlib.sha256(content).hexdigest() for content in contents]
        with self._lock:
            for held in self._held:
                held.update(shas)
        wanted = {self.path(sha): content for sha, content in zip(shas, contents, strict=True)}
        with _disk(self._blobs):
            _write_atomically(
                {path: content for path, content in wanted.items() if not _holds(path, content)}
            )
            _sync_folder(self._blobs)
        return shas

    @contextmanager
    def holding(self) -> Iterator[set[str]]:
        """Keep every blob that is put meanwhile from `collect`: the ledger does not name it yet.

        What was held by another holder that ends meanwhile is held further, so a collector that first holds
        and then reads the ledger misses nothing.
        """
        held: set[str] = set()
        with self._lock:
            self._held.append(held)
        try:
            yield held
        finally:
            with self._lock:
                self._held = [other for other in self._held if other is not held]
                for other in self._held:
                    other.update(held)

    def get(self, sha: str) -> bytes:
        """Return a blob, verified.

        Raises:
            NotFoundError: no such blob.
            DigestError: the file is damaged.
        """
        path = self.path(sha)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"blob {sha}: not in {self._blobs}") from None
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != sha:
            raise DigestError(f"{path} is damaged: its content does not have the SHA-256 of its name")
        return content

    def has(self, sha: str) -> bool:
        """Whether the blob is there (its content is checked by `get`)."""
        return self.path(sha).is_file()

    def path(self, sha: str) -> Path:
        """Return where the blob is or would be.

        Raises:
            NotFoundError: not 64 hex digits.
        """
        if not _SHA256.fullmatch(sha):
            raise NotFoundError(f"blob {sha[:80]!r}: not a SHA-256 in hex")
        return self._blobs / sha

    def commit(self, manifest: Manifest, blobs: Iterable[bytes]) -> tuple[str, bytes]:
        """Store a version: its blobs, then its manifest, as a blob of its own.

        The version exists when the caller has added the ledger's row with what this returns.

        Args:
            manifest: of the version.
            blobs: contents that are not in the repository yet (others may come along).

        Returns:
            The version's id, and the encoded manifest.

        Raises:
            NotFoundError: a blob of the manifest is neither here nor given; the manifest is not stored.
            DigestError: a file that the manifest needs has another size than it says.
            DiskError: the disk is full or refuses.
        """
        for content in blobs:
            self.put(content)
        for sha in sorted(manifest.blobs):
            if not self.has(sha):
                raise NotFoundError(f"{manifest.model} version {manifest.number}: blob {sha} is missing")
        for step in _steps(manifest):
            if self.path(step.blob).stat().st_size != step.size:
                raise DigestError(f"{self.path(step.blob)}: not of the {step.size} bytes in the manifest")
        encoded = encode_manifest(manifest)
        return self.put(encoded), encoded

    def commit_variant(self, manifest: VariantManifest, file: bytes) -> tuple[str, bytes]:
        """Store a variant: its file, then its manifest, as a blob of its own.

        The variant exists when the caller has added the ledger's row with what this returns.

        Returns:
            The variant's id, and the encoded manifest.

        Raises:
            DigestError: the file is not the one that the manifest names; nothing is stored.
            DiskError: the disk is full or refuses.
        """
        if (hashlib.sha256(file).hexdigest(), len(file)) != (manifest.file, manifest.size):
            raise DigestError(f"variant of {manifest.model}: the file is not the one in its manifest")
        self.put(file)
        encoded = encode_manifest(manifest)
        return self.put(encoded), encoded

    def verify(self, manifest: Manifest | VariantManifest) -> None:
        """Read every blob of a version or a variant and check it.

        Raises:
            NotFoundError, DigestError, DiskError: the first fault found, with the file's name.
        """
        for sha in sorted(manifest.blobs | {version_id(manifest)}):
            self.get(sha)

    def collect(self, keep: AbstractSet[str]) -> int:
        """Remove every blob that is neither in `keep` nor held.

        What belongs in it: the `blobs` of every version and every variant in the ledger, and the ids of all
        of them, which name their manifests.

        Returns:
            Bytes freed.

        Raises:
            DiskError: a file could not be removed.
        """
        freed = 0
        with _disk(self._blobs):
            for path in sorted(self._blobs.iterdir()):
                if not _SHA256.fullmatch(path.name) or path.name in keep:
                    continue
                with self._lock:  # nobody begins to put it again between the look and the removal
                    if not any(path.name in held for held in self._held):
                        freed += path.stat().st_size
                        path.unlink()
            _sync_folder(self._blobs)
        return freed


def _steps(manifest: Manifest) -> Iterator[StepRecord]:
    for member in manifest.structures.values():
        yield from member.files


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False


def _write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, and move them there once all are on the disk."""
    beside: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=_TEMPORARY)
            beside[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        for written in beside.values():  # the first one takes most of the others along
            _sync(written, os.O_RDONLY)
        for path, written in beside.items():
            written.replace(path)
    except BaseException:
        for written in beside.values():
            with suppress(OSError):
                written.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}; free space or check the disk") from error
