"""What refers to a commit, its signatures above all: a file per commit beside the layout."""

from collections.abc import Iterable
from pathlib import Path

from liberatai_coordinator.repository import signing
from liberatai_coordinator.repository.descriptors import (
    ENVELOPE,
    MAX_JSON_BYTES,
    SIGNATURE,
    Descriptor,
    Index,
    Manifest,
    decode,
    encode,
)
from liberatai_coordinator.repository.layout import Layout, write_atomically


class Referrers:
    """The folder `referrers/` of a repository."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self._layout = layout
        self._folder = folder / "referrers"

    def envelopes(self, digest: str) -> list[bytes]:
        """Return the signatures of a commit, not verified yet."""
        found = []
        for one in self.of(digest).manifests[: signing.MAX_SIGNATURES]:
            if one.artifact_type not in (SIGNATURE, None):
                continue
            manifest = decode(self._layout.json(one.digest), Manifest, "signature")
            if manifest.artifact_type != SIGNATURE or manifest.subject is None:
                continue
            if manifest.subject.digest == digest:
                found += [
                    self._layout.get(layer.digest, limit=MAX_JSON_BYTES)
                    for layer in manifest.layers
                    if layer.media_type == ENVELOPE
                ]
        return found

    def of(self, digest: str) -> Index:
        """Return what refers to a commit, as a registry would tell it."""
        path = self._path(digest)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return Index(schema_version=2, manifests=())
        return decode(content, Index, str(path))

    def _path(self, digest: str) -> Path:
        return self._folder / self._layout.path(digest).name

    def add(self, digest: str, described: Iterable[Descriptor]) -> None:
        """Note signature manifests that are in the repository as some of a commit's."""
        path, content = self.file(digest, described)
        write_atomically(path, content)

    def file(self, digest: str, described: Iterable[Descriptor]) -> tuple[Path, bytes]:
        """Return the file that notes signature manifests as some of a commit's, and what it shall hold."""
        before = self.of(digest).manifests
        known = {one.digest for one in before}
        after = (*before, *(one for one in described if one.digest not in known))
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        return path, encode(Index(schema_version=2, manifests=after))

    def forget(self, needed: set[str]) -> None:
        """Remove what is noted of commits that are not among the blobs that are needed."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if f"sha256:{path.name}" not in needed:
                    path.unlink(missing_ok=True)
