"""Checking a repository, and collecting what it needs no more."""

from collections.abc import Callable, Iterator

from liberatai_coordinator.repository.descriptors import Index, Manifest, decode
from liberatai_coordinator.repository.history import Entry
from liberatai_coordinator.repository.layout import write_atomically
from liberatai_coordinator.repository.names import short
from liberatai_coordinator.repository.store import KIND, Loaded, Store
from liberatai_core.errors import LiberataiError


def collected(store: Store) -> set[str]:
    """Return the commits whose files were let go by rule."""
    try:
        text = (store.folder / "collected").read_text()
    except FileNotFoundError:
        return set()
    return set(text.split())


def verify(store: Store, digest: str, *, parents: bool = True) -> list[LiberataiError]:
    """Read everything of a commit, and of what it comes from; returns every fault with what it is in."""
    faults: list[LiberataiError] = []
    seen: set[str] = set()
    gone = collected(store)
    wanted, checked = [digest], set[str]()
    while wanted:
        one = wanted.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            loaded = store.read(one)
        except LiberataiError as error:
            faults.append(error)
            continue
        faults += _faults(store, loaded, checked, files=one not in gone)
        if parents:
            here = [parent for parent in loaded.commit.parents if store.layout.has(parent)]
            wanted += here
    return faults


def _faults(store: Store, loaded: Loaded, checked: set[str], *, files: bool) -> Iterator[LiberataiError]:
    try:
        needed = _needed(store, loaded.digest, files=files)
    except LiberataiError as error:
        yield error
        return
    for one in sorted(needed - checked):
        checked.add(one)
        try:
            store.layout.check(one)
        except LiberataiError as error:
            yield error


def gc(
    store: Store, keep: Callable[[Entry, int], bool] = lambda _entry, _age: True, *, dry_run: bool = False
) -> tuple[list[str], int]:
    """Remove what nothing names, and the files of old commits that a rule lets go.

    Args:
        store: the repository.
        keep: whether an untagged commit keeps its files, by its line and its place in the history (0 is
            the newest of its model). What tags and branches name always does.
        dry_run: only tell.

    Returns:
        Commits whose files go, and the bytes that are (or would be) freed.

    Raises:
        DiskError: the disk refuses.
    """
    with store.layout.alone():
        refs = store.layout.refs()
        named = {one.digest for one in refs.values() if one.note(KIND) != "signature"}
        gone, going = collected(store), []
        ages: dict[str, int] = {}
        needed: set[str] = {one.digest for one in refs.values()}
        for entry in store.history.walk(named):
            age = ages[entry.model] = ages.get(entry.model, -1) + 1
            if entry.digest not in named and entry.digest not in gone and not keep(entry, age):
                going.append(entry.digest)
                gone.add(entry.digest)
            needed |= _needed(store, entry.digest, files=entry.digest not in gone)
        garbage = [digest for digest in store.layout.blobs() if digest not in needed]
        freed = sum(store.layout.path(digest).stat().st_size for digest in garbage)
        if not dry_run:
            if going:
                text = "".join(f"{digest}\n" for digest in sorted(gone))
                write_atomically(store.folder / "collected", text.encode())
            freed = store.layout.remove(garbage)
            store.referrers.forget(needed)
    return going, freed


def _needed(store: Store, digest: str, *, files: bool) -> set[str]:
    needed = {digest}
    index = decode(store.layout.json(digest), Index, short(digest))
    for number, one in enumerate(index.manifests):
        needed.add(one.digest)
        manifest = decode(store.layout.json(one.digest), Manifest, short(one.digest))
        needed.add(manifest.config.digest)
        if files or number == 0:
            needed |= {layer.digest for layer in manifest.layers}
    for one in store.referrers.of(digest).manifests:
        needed.add(one.digest)
        manifest = decode(store.layout.json(one.digest), Manifest, short(one.digest))
        needed |= {part.digest for part in (manifest.config, *manifest.layers)}
    return needed
