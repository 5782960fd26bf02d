"""What `log` shows of every commit, in one file: a copy of what was read and verified once.

One line per commit: a checksum and JSON. Losing the file, or a line of it, costs time only: what is not in it
is read from the commits again.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from heapq import heappop, heappush
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from liberatai_coordinator.repository.commits import Commit
from liberatai_core.errors import NotFoundError

FILE: Final = "history.jsonl"
MAX_LINE: Final = 64 * 1024


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One commit, as a list shows it.

    Attributes:
        digest: of its index.
        bytes: what its variants take on a device, together.
        signer: public key (hex) whose signature was believed.
    """

    digest: str
    model: str
    kind: str
    signer: str
    parents: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    author: str = ""
    time: int = 0
    message: str = ""
    number: int | None = None
    job: str = ""
    round: int = 0
    updates: int = 0
    bytes: int = 0
    variants: int = 0
    metrics: dict[str, float] = {}


def entry_of(digest: str, commit: Commit, signer: str) -> Entry:
    """Return the line of a commit that was verified."""
    return Entry(
        digest=digest,
        model=commit.model,
        kind=commit.kind,
        signer=signer,
        parents=commit.parents,
        author=commit.author,
        time=commit.time,
        message=commit.message.partition("\n")[0][:256],
        number=commit.number,
        job=commit.job,
        round=commit.round,
        updates=commit.updates,
        bytes=sum(variant.bytes for variant in commit.variants),
        variants=len(commit.variants),
        metrics=dict(commit.metrics),
    )


class History:
    """The lines of one repository."""

    def __init__(self, folder: Path, read: Callable[[str], Entry]) -> None:
        """Use the file of a folder; `read` reads and verifies a commit that is not in it."""
        self._path = folder / FILE
        self._read = read
        self._known: dict[str, Entry] | None = None
        self._size = -1

    def get(self, digest: str) -> Entry:
        """Return the line of a commit.

        Raises:
            NotFoundError, DigestError, SignatureError: it is not in the file, and cannot be read.
        """
        found = self._lines().get(digest)
        if found is None:
            found = self._read(digest)
            self.add([found])
        return found

    def add(self, entries: Iterable[Entry]) -> None:
        """Note commits that were verified; a disk that refuses costs nothing but time."""
        known = self._lines()
        new = {one.digest: one for one in entries if one.digest not in known}
        lines = b"".join(_line(one) for one in new.values())
        if not lines:
            return
        known.update(new)
        with suppress(OSError):
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, lines)  # one write at the end of the file: lines of two processes do not mix
            finally:
                os.close(handle)

    def _lines(self) -> dict[str, Entry]:
        try:
            size = self._path.stat().st_size
        except OSError:
            size = 0
        if self._known is None or size != self._size:
            before = self._known or {}
            self._known = {**before, **_read_lines(self._path)}
            self._size = size
        return self._known

    def walk(self, starts: Iterable[str]) -> Iterator[Entry]:
        """Yield commits, every one before its parents; of unrelated ones the younger first.

        Parents that are not here (only part of a history was fetched) are left out.
        """
        yield from order(self._reachable(starts))

    def before(self, start: str) -> Iterator[str]:
        """Yield a commit and everything that it comes from, the nearest first."""
        for digest, _ in _distances(self.get, start):
            yield digest

    def _reachable(self, starts: Iterable[str]) -> dict[str, Entry]:

        wanted, found = list(starts), dict[str, Entry]()
        missing: list[Entry] = []
        known = self._lines()
        while wanted:
            digest = wanted.pop()
            if digest in found:
                continue
            entry = known.get(digest)
            if entry is None:
                try:
                    entry = self._read(digest)
                except NotFoundError:
                    continue
                missing.append(entry)
            found[digest] = entry
            wanted += entry.parents
        self.add(missing)
        return found


def order(entries: Mapping[str, Entry]) -> Iterator[Entry]:
    """Yield commits, every one before its parents; of unrelated ones the younger first."""
    children = dict.fromkeys(entries, 0)
    for entry in entries.values():
        for parent in entry.parents:
            if parent in children:
                children[parent] += 1
    ready: list[tuple[int, int, str]] = []
    for digest, count in children.items():
        if count == 0:
            entry = entries[digest]
            heappush(ready, (-entry.time, -(entry.number or 0), digest))
    while ready:
        entry = entries[heappop(ready)[2]]
        yield entry
        for parent in entry.parents:
            if parent in children:
                children[parent] -= 1
                if children[parent] == 0:
                    older = entries[parent]
                    heappush(ready, (-older.time, -(older.number or 0), parent))


def ancestor(entries: Callable[[str], Entry], first: str, second: str) -> str | None:
    """Return the nearest commit that both come from; None if there is none."""
    ours = dict(_distances(entries, first))
    best: tuple[int, str] | None = None
    for digest, distance in _distances(entries, second):
        if digest in ours and (best is None or (ours[digest] + distance, digest) < best):
            best = (ours[digest] + distance, digest)
    return best[1] if best else None


def _distances(entries: Callable[[str], Entry], start: str) -> Iterator[tuple[str, int]]:

    seen, layer, distance = {start}, [start], 0
    while layer:
        after: list[str] = []
        for digest in layer:
            yield digest, distance
            try:
                parents = entries(digest).parents
            except NotFoundError:
                continue
            after += [parent for parent in parents if parent not in seen]
            seen.update(parents)
        layer, distance = list(dict.fromkeys(after)), distance + 1


def _line(entry: Entry) -> bytes:
    text = msgspec.json.encode(entry)
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _read_lines(path: Path) -> dict[str, Entry]:
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    decoder = msgspec.json.Decoder(Entry)
    found: dict[str, Entry] = {}
    for line in content.split(b"\n"):
        if len(line) > MAX_LINE or line[8:9] != b" ":
            continue
        text = line[9:]
        if b"%08x" % zlib.crc32(text) != line[:8]:
            continue
        try:
            entry = decoder.decode(text)
        except (msgspec.DecodeError, ValueError):
            continue
        found[entry.digest] = entry
    return found
