"""Commits to a registry and back; and what others have there becomes a commit.

Pushed are a commit, its signatures (under the tag that registries without a referrers API use) and what it
comes from, as far as the registry does not have it: blobs, manifests, the index, the tag last. So whoever
reads the tag finds everything. Fetched are records and signatures first; files only of commits that somebody
trusted has signed.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from liberatai_coordinator.repository import care, imports
from liberatai_coordinator.repository.descriptors import (
    COMMIT,
    FILEPATH,
    INDEX,
    MANIFEST,
    OTHER_INDEX,
    TITLE,
    Descriptor,
    Index,
    Manifest,
    decode,
    digest_of,
    encode,
)
from liberatai_coordinator.repository.files import About, commit_file
from liberatai_coordinator.repository.names import Place, short
from liberatai_coordinator.repository.remote.registry import Registry
from liberatai_coordinator.repository.store import KIND, Loaded, Store
from liberatai_core.errors import (
    DigestError,
    DiskError,
    NotFoundError,
    SchemaError,
    StateError,
    TooLargeError,
    UnsafeFileError,
)

MAX_HISTORY: Final = 100_000
_WEIGHTS: Final = (".safetensors", ".onnx", ".pt", ".pth", ".bin")

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes of all): called while something is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did."""

    digest: str
    commits: int
    blobs: int
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a fetch did.

    Attributes:
        commits: that were not here before.
        shallow: whether part of what it comes from is not at the registry any more.
        name: MODEL:TAG that names it here now; "" if that name is elsewhere (merge the two).
    """

    loaded: Loaded
    commits: int
    shallow: bool
    name: str
    imported: bool = False


class KeptUploads:
    """Where uploads stand, in files beside the repository."""

    def __init__(self, folder: Path) -> None:
        """Use `uploads/` below a repository's folder."""
        self._folder = folder / "uploads"

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """Return the address of an upload that was begun."""
        try:
            return self._path(key).read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError):
            return None

    def set(self, key: str, location: str | None) -> None:
        """Note the address of an upload; None: it is over. Losing it costs bytes only."""
        path = self._path(key)
        if location is None:
            path.unlink(missing_ok=True)
            return
        self._folder.mkdir(exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        beside.write_text(location, encoding="utf-8")
        beside.replace(path)


# --- push ------------------------------------------------------------------------------------------------


def push(
    store: Store,
    digest: str,
    place: Place,
    registry: Registry,
    *,
    force: bool = False,
    progress: Progress = lambda _what, _done, _all: None,
) -> Pushed:
    """Bring a commit to a registry and let a tag name it.

    Raises:
        NotFoundError, DigestError: a file of the commit is gone or damaged here.
        StateError: the tag names something that the commit does not come from; nothing is named anew.
        RegistryError: the registry is out of reach or refuses.
    """
    loaded = store.read(digest)
    there = registry.has_manifest(place.tag)
    if there not in (None, digest) and not force:
        _require_forward(store, str(there), digest, place)
    missing = _missing(store, loaded, registry)
    blobs = 0
    uploads = KeptUploads(store.folder)
    for one in reversed(missing):  # the oldest first: whatever is there is complete
        blobs += _push_commit(store, one, registry, uploads, progress)
    registry.put_manifest(place.tag, store.layout.json(digest), INDEX)
    store.set_remote(str(place), loaded)
    return Pushed(digest=digest, commits=len(missing), blobs=blobs, sent_bytes=registry.sent_bytes)


def _require_forward(store: Store, there: str, wanted: str, place: Place) -> None:
    if store.layout.has(there):
        if store.is_ancestor(there, wanted):
            return
        why = f"which {short(wanted)} does not come from"
    else:
        why = "which is not here"
    raise StateError(f"{place} is at {short(there)}, {why}: fetch it, merge, and push again (or --force)")


def _missing(store: Store, loaded: Loaded, registry: Registry) -> list[Loaded]:
    """Return the commits that the registry lacks, the newest first; what it has, it has with all parents."""
    gone = care.collected(store)
    wanted, seen, missing = [loaded.digest], {loaded.digest}, []
    while wanted:
        digest = wanted.pop(0)
        if (digest in gone and digest != loaded.digest) or not store.layout.has(digest):
            continue  # its files were let go here: the history at the registry begins after it
        if registry.has_manifest(digest) == digest:
            continue
        found = store.read(digest)
        missing.append(found)
        for parent in found.commit.parents:
            if parent not in seen:
                seen.add(parent)
                wanted.append(parent)
    return missing


def _push_commit(
    store: Store, loaded: Loaded, registry: Registry, uploads: KeptUploads, progress: Progress
) -> int:
    sent = 0
    manifests = [*loaded.manifests, *store.referrers.of(loaded.digest).manifests]
    index = store.layout.json(loaded.digest)
    for one in loaded.manifests:
        sent += _push_blobs(store, one, registry, uploads, progress)
        registry.put_manifest(one.digest, store.layout.json(one.digest), MANIFEST)
    registry.put_manifest(loaded.digest, index, INDEX)
    for one in manifests[len(loaded.manifests) :]:
        sent += _push_blobs(store, one, registry, uploads, progress)
        registry.put_manifest(one.digest, store.layout.json(one.digest), MANIFEST)
    registry.put_manifest(loaded.digest.replace(":", "-"), encode(store.referrers.of(loaded.digest)), INDEX)
    return sent


def _push_blobs(
    store: Store, one: Descriptor, registry: Registry, uploads: KeptUploads, progress: Progress
) -> int:
    manifest = decode(store.layout.json(one.digest), Manifest, short(one.digest))
    sent = 0
    for blob in dict.fromkeys((manifest.config.digest, *(layer.digest for layer in manifest.layers))):
        wanted = next(part for part in (manifest.config, *manifest.layers) if part.digest == blob)
        if registry.has_blob(blob):
            continue
        store.layout.check(blob)
        name = wanted.note(TITLE) or short(blob)

        def told(done: int, wanted: Descriptor = wanted, name: str = name) -> None:
            progress(f"push {name}", done, wanted.size)

        registry.push_blob(wanted, partial(_opened, store.layout.path(blob)), uploads, told)
        sent += 1
    return sent


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")


# --- fetch -----------------------------------------------------------------------------------------------


def fetch(
    store: Store,
    place: Place,
    registry: Registry,
    *,
    model: str | None = None,
    author: str = "",
    force: bool = False,
    progress: Progress = lambda _what, _done, _all: None,
) -> Fetched:
    """Bring what a tag of a registry names here, verified, and note that it was seen there.

    Args:
        store: gets it.
        place: where it is.
        registry: a connection to there.
        progress: is told how far it is.
        model: name here of what is no commit of ours; None: the last part of its name there.
        author: who imports it then.
        force: accept a tag that went back, or names another model than before.

    Raises:
        SignatureError: nobody who is trusted has signed it; none of its files were fetched.
        StateError: the tag went back, or was moved to what does not come from what it named before.
        NotFoundError, DigestError, SchemaError, RegistryError: absent, not what it says, or out of reach.
    """
    content, media_type = registry.manifest(place.digest or place.tag)
    digest = digest_of(content)
    if place.digest and digest != place.digest:
        raise DigestError(f"{place}: the registry sent something else")
    if not _is_commit(content, media_type):
        return _import(store, place, registry, content, media_type, model, author, progress)
    with store.writing():
        new, shallow = _records(store, digest, content, registry)
        loaded = store.read(digest)
        if not force:
            _require_no_rollback(store, place, loaded)
        for one in new:
            if one == digest or _complete(store, registry, one):
                _files(store, store.read(one), registry, progress)
        store.set_remote(str(place), loaded)
    name = f"{loaded.commit.model}:{place.tag}"
    try:
        store.set_ref(loaded.commit.model, place.tag, digest, kind="branch", force=force)
    except StateError:
        name = ""
    return Fetched(loaded=loaded, commits=len(new), shallow=shallow, name=name)


def _is_commit(content: bytes, media_type: str) -> bool:
    if media_type not in (INDEX, OTHER_INDEX, ""):
        return False
    try:
        return decode(content, Index, "index").artifact_type == COMMIT
    except SchemaError:
        return False


def _require_no_rollback(store: Store, place: Place, loaded: Loaded) -> None:
    known = store.remote(str(place))
    if known is None or known == loaded.digest:
        return
    before = store.read(known).commit
    if before.model != loaded.commit.model:
        raise StateError(
            f"{place} was {before.model}, and is {loaded.commit.model} now: exchanged? (--force takes it)"
        )
    if not store.is_ancestor(known, loaded.digest):
        raise StateError(
            f"{place} was at {short(known)}, and {short(loaded.digest)} does not come from it: it went back "
            "or was exchanged (--force takes it)"
        )


def _records(store: Store, start: str, content: bytes, registry: Registry) -> tuple[list[str], bool]:
    """Bring records and signatures of a commit and of what it comes from, each verified.

    Returns:
        Commits that were not here, and whether some are not at the registry.
    """
    new: list[str] = []
    wanted, seen, shallow = [start], {start}, False
    named = [one.digest for one in store.layout.refs().values() if one.note(KIND) in ("branch", "tag")]
    known = {entry.digest for entry in store.history.walk(named)}  # these are here with all their parents
    while wanted:
        digest = wanted.pop(0)
        if digest in known and (digest != start or _has_files(store, store.read(digest))):
            continue
        try:
            index = content if digest == start else registry.manifest(digest)[0]
        except NotFoundError:
            shallow = True
            continue
        parents = _record(store, digest, index, registry)
        new.append(digest)
        if len(seen) > MAX_HISTORY:
            raise TooLargeError(f"more than {MAX_HISTORY} commits of history")
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                wanted.append(parent)
    return new, shallow


def _record(store: Store, digest: str, content: bytes, registry: Registry) -> tuple[str, ...]:
    """Bring one record and its signatures, and return the parents."""
    index = decode(content, Index, short(digest))
    if index.artifact_type != COMMIT or not index.manifests:
        raise SchemaError(f"{short(digest)}: no commit of ours")
    blobs = {digest: content}
    own = registry.manifest(index.manifests[0].digest)[0]
    blobs[index.manifests[0].digest] = own
    manifest = decode(own, Manifest, short(digest))
    blobs[manifest.config.digest] = _small(registry, manifest.config)
    signatures: tuple[Descriptor, ...] = ()
    try:
        told = registry.manifest(digest.replace(":", "-"))[0]
        signatures = decode(told, Index, "signatures").manifests[:16]
    except NotFoundError:
        pass  # unsigned: refused below
    for one in signatures:
        signed = registry.manifest(one.digest)[0]
        blobs[one.digest] = signed
        part = decode(signed, Manifest, "signature")
        for blob in (part.config, *part.layers[:4]):
            blobs[blob.digest] = _small(registry, blob)
    store.layout.put_named(blobs)
    store.referrers.add(digest, signatures)
    return store.read(digest).commit.parents


def _small(registry: Registry, wanted: Descriptor) -> bytes:
    if wanted.size > 4 * 1024 * 1024:
        raise TooLargeError(f"{wanted.digest}: a record of {wanted.size} bytes")
    content = b"".join(registry.pull_blob(wanted, 0))
    if digest_of(content) != wanted.digest:
        raise DigestError(f"{wanted.digest}: the registry sent something else")
    return content


def _complete(store: Store, registry: Registry, digest: str) -> bool:
    return all(registry.has_manifest(one.digest) for one in store.read(digest).manifests[1:])


def _has_files(store: Store, loaded: Loaded) -> bool:
    for one in loaded.manifests:
        if not store.layout.has(one.digest):
            return False
        manifest = decode(store.layout.json(one.digest), Manifest, short(one.digest))
        if not all(store.layout.has(part.digest) for part in (manifest.config, *manifest.layers)):
            return False
    return True


def _files(store: Store, loaded: Loaded, registry: Registry, progress: Progress) -> None:
    for one in loaded.manifests:
        content = registry.manifest(one.digest)[0]
        manifest = decode(content, Manifest, short(one.digest))
        for part in (manifest.config, *manifest.layers):
            if not store.layout.has(part.digest):
                pull_into(store, part, registry, progress)
        store.layout.put_named({one.digest: content})


def pull_into(store: Store, wanted: Descriptor, registry: Registry, progress: Progress) -> None:
    """Bring a blob into the repository; what an earlier try left is gone on with.

    Raises:
        DigestError: another one came. RegistryError, NotFoundError, DiskError: as told.
    """
    begun = store.folder / "partial" / wanted.sha
    name = wanted.note(TITLE) or short(wanted.digest)
    try:
        begun.parent.mkdir(exist_ok=True)
        with begun.open("ab") as file:
            offset = file.tell()
            if offset > wanted.size:
                file.truncate(0)
                offset = 0
            if offset < wanted.size:
                for part in registry.pull_blob(wanted, offset):
                    file.write(part)
                    offset += len(part)
                    progress(f"fetch {name}", offset, wanted.size)
        store.layout.put_stream(_parts(begun), wanted)
    except (DigestError, TooLargeError):
        begun.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise DiskError(f"{begun}: {error.strerror}") from None
    begun.unlink(missing_ok=True)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(1024 * 1024):
            yield part


# --- artifacts of others ---------------------------------------------------------------------------------


def _import(
    store: Store,
    place: Place,
    registry: Registry,
    content: bytes,
    media_type: str,
    model: str | None,
    author: str,
    progress: Progress,
) -> Fetched:
    """Commit what is no commit of ours: the one weights file of a ModelPack, Docker or plain artifact."""
    origin = f"{place.host}/{place.name}@{digest_of(content)}"
    manifest = _manifest_of(content, media_type, registry, origin)
    layer = _weights_of(manifest.layers, origin)
    if layer.size > imports.MAX_FILE_BYTES:
        raise TooLargeError(f"{origin}: a file of {layer.size} bytes, at most {imports.MAX_FILE_BYTES}")
    file = bytearray()
    for part in registry.pull_blob(layer, 0):
        file += part
        progress(f"fetch {place.name}", len(file), layer.size)
    if digest_of(bytes(file)) != layer.digest:
        raise DigestError(f"{origin}: the registry sent something else")
    name = Path(layer.note(FILEPATH) or layer.note(TITLE) or "model").name
    parsed = imports.parse(*_unpacked(bytes(file), name, layer.media_type))
    about = About(
        model=model or place.name.rpartition("/")[2].replace(".", "_")[:64],
        message=f"fetched from {place}",
        author=author,
        licence=(manifest.annotations or {}).get("org.opencontainers.image.licenses", "")[:512],
    )
    heads = [one.digest for one in store.names(about.model) if one.tag == place.tag]
    known = [one for one in heads if store.read(one).commit.origin == origin[:512]]
    if known:
        return Fetched(
            loaded=store.read(known[0]),
            commits=0,
            shallow=False,
            name=f"{about.model}:{place.tag}",
            imported=True,
        )
    made = commit_file(store, parsed, about, heads, branch=place.tag, origin=origin)
    return Fetched(loaded=made, commits=1, shallow=False, name=f"{about.model}:{place.tag}", imported=True)


def _manifest_of(content: bytes, media_type: str, registry: Registry, origin: str) -> Manifest:
    if media_type in (INDEX, OTHER_INDEX):
        index = decode(content, Index, origin)
        if len(index.manifests) != 1:
            raise SchemaError(
                f"{origin}: an index of {len(index.manifests)} manifests: give one by its digest"
            )
        content = registry.manifest(index.manifests[0].digest)[0]
    return decode(content, Manifest, origin)


def _weights_of(layers: Sequence[Descriptor], origin: str) -> Descriptor:
    """Return the one layer that holds weights."""

    def named(layer: Descriptor) -> str:
        return (layer.note(FILEPATH) or layer.note(TITLE)).lower()

    weights = [layer for layer in layers if "weight" in layer.media_type or "safetensors" in layer.media_type]
    weights = weights or [layer for layer in layers if named(layer).endswith(_WEIGHTS)]
    weights = weights or ([layers[0]] if len(layers) == 1 else [])
    if len(weights) != 1:
        raise SchemaError(f"{origin}: {len(weights)} files of weights among {len(layers)}, one is wanted")
    return weights[0]


def _unpacked(file: bytes, name: str, media_type: str) -> tuple[bytes, str]:
    """Return a model's file and its name, out of a tar if its kind says so; nothing is written anywhere."""
    if not media_type.endswith((".tar", "+tar", ".tar+gzip", "+gzip")):
        return file, name
    if media_type.endswith("gzip"):
        raise UnsafeFileError(f"{name}: a packed archive: ask for the raw form")
    found: list[tuple[bytes, str]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(file), mode="r:") as archive:
            for member in archive:
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts:
                    raise UnsafeFileError(f"{name}: {member.name[:80]!r} lies outside of the archive")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UnsafeFileError(f"{name}: {member.name[:80]!r} is a link or a device")
                if member.name.lower().endswith(_WEIGHTS):
                    read = archive.extractfile(member)
                    found.append((read.read(imports.MAX_FILE_BYTES + 1) if read else b"", parts[-1]))
    except tarfile.TarError as error:
        raise SchemaError(f"{name}: a damaged archive ({str(error)[:80]})") from None
    if len(found) != 1:
        raise SchemaError(f"{name}: {len(found)} files of weights in the archive; one is wanted")
    return found[0]
