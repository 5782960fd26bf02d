"""The repository on disk: commits written whole, read verified, named by tags, collected by rule.

Layout of the folder: an OCI image layout, and beside it `signing.key`, `trust.yaml`, `referrers/` (which
signatures belong to a commit), `collected` (whose files were let go) and `history.jsonl` (a copy for lists).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from liberatai_coordinator.repository import cards, signing, trust
from liberatai_coordinator.repository.commits import (
    Commit,
    Variant,
    index_of,
    manifest_of,
    model_config,
    variant_manifest,
)
from liberatai_coordinator.repository.descriptors import (
    COMMIT,
    COMMIT_CONFIG,
    ENVELOPE,
    FILEPATH,
    INDEX,
    MANIFEST,
    MODEL_CONFIG,
    OURS,
    SIGNATURE,
    TITLE,
    Descriptor,
    Index,
    Manifest,
    decode,
    describe,
    encode,
)
from liberatai_coordinator.repository.history import Entry, History, ancestor, entry_of
from liberatai_coordinator.repository.layout import Layout
from liberatai_coordinator.repository.names import (
    BRANCH,
    Wanted,
    full_ref,
    looks_like_digest,
    parse_ref,
    require_model,
    short,
    unknown,
)
from liberatai_coordinator.repository.referrers import Referrers
from liberatai_core.errors import (
    DigestError,
    LiberataiError,
    NotFoundError,
    SchemaError,
    StateError,
)

KIND: Final = f"{OURS}ref"
"""Annotation of a reference: branch, tag, remote or signature."""
REMOTE: Final = "remote/"
MAX_FOUND: Final = 32

Layer = tuple[Descriptor, bytes | None]
"""What a variant consists of; no content: the blob is in the repository already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A commit that was read and verified.

    Attributes:
        digest: of its index.
        size: bytes of its index.
        signer: who vouches for it, by the trust file.
        manifests: descriptors in the index: the commit's own, then one per variant.
    """

    digest: str
    size: int
    commit: Commit
    signer: signing.Trusted
    manifests: tuple[Descriptor, ...]

    @property
    def descriptor(self) -> Descriptor:
        """Of the index."""
        return Descriptor(media_type=INDEX, digest=self.digest, size=self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A tag or a branch.

    Attributes:
        kind: "branch" (commits move it) or "tag".
    """

    model: str
    tag: str
    kind: str
    digest: str


class Store:
    """A model repository. Safe for threads and processes."""

    def __init__(self, folder: Path) -> None:
        """Open the repository of a folder; it is made if there is none.

        Raises:
            ConfigError: the folder is something else. DiskError: the disk refuses.
        """
        self.layout = Layout(folder)
        self.folder = folder
        self.referrers = Referrers(self.layout, folder)
        self.history = History(folder, self._entry)

    # --- reading -----------------------------------------------------------------------------------

    def trusted(self) -> tuple[signing.Trusted, ...]:
        """Return whose signatures are believed."""
        return trust.trusted(self.folder)

    def read(self, digest: str) -> Loaded:
        """Return a commit, everything but its files verified.

        Raises:
            NotFoundError: it is not here.
            SchemaError: it is something else than a commit, or not in its one form.
            DigestError: a blob is damaged.
            SignatureError: nobody who is trusted vouches for it.
        """
        content = self.layout.json(digest)
        index, commit = self.parsed(digest, content)
        signer = signing.signer_of(self.referrers.envelopes(digest), digest, commit.model, self.trusted())
        return Loaded(
            digest=digest, size=len(content), commit=commit, signer=signer, manifests=index.manifests
        )

    def parsed(self, digest: str, content: bytes) -> tuple[Index, Commit]:
        """Return a commit whose signature was not looked at.

        Raises:
            NotFoundError, DigestError, SchemaError: as `read`.
        """
        what = f"commit {short(digest)}"
        index = decode(content, Index, what)
        if index.artifact_type != COMMIT or not index.manifests:
            raise SchemaError(f"{what}: no commit of ours, but {index.artifact_type or 'an index'}")
        own = self.layout.json(index.manifests[0].digest)
        manifest = decode(own, Manifest, what)
        commit = decode(self.layout.json(manifest.config.digest), Commit, what)
        if index_of(commit, own) != content or manifest_of(commit, manifest.layers)[0] != own:
            raise SchemaError(f"{what}: not the index that its record makes: content was exchanged")
        return index, commit

    def entry(self, digest: str) -> Entry:
        """Return the line that a list shows of a commit."""
        return self.history.get(digest)

    def _entry(self, digest: str) -> Entry:
        loaded = self.read(digest)
        return entry_of(digest, loaded.commit, loaded.signer.key)

    def log(self, starts: Iterable[str]) -> Iterator[Entry]:
        """Yield commits and what they come from, younger ones first; only what is still trusted."""
        keys: dict[str, list[signing.Trusted]] = {}
        for key in self.trusted():
            keys.setdefault(key.key, []).append(key)
        believed: dict[tuple[str, str], bool] = {}
        for entry in self.history.walk(starts):
            pair = (entry.signer, entry.model)
            if pair not in believed:
                believed[pair] = any(key.covers(entry.model) for key in keys.get(entry.signer, []))
            if not believed[pair]:
                self.read(entry.digest)  # tells why not
            yield entry

    def ancestor(self, first: str, second: str) -> str | None:
        """Return the nearest commit that both come from; None if there is none."""
        return ancestor(self.entry, first, second)

    # --- names -------------------------------------------------------------------------------------

    def names(self, model: str | None = None) -> list[Named]:
        """Return all tags and branches, or those of a model."""
        found = []
        for name, one in sorted(self.layout.refs().items()):
            kind = one.note(KIND)
            owner, _, tag = name.rpartition(":")
            if kind in ("branch", "tag") and model in (None, owner):
                found.append(Named(model=owner, tag=tag, kind=kind, digest=one.digest))
        return found

    def models(self) -> list[str]:
        """Return the names of all models."""
        return sorted({one.model for one in self.names()})

    def find(self, text: str) -> str:
        """Return the digest of the commit that a text names.

        Raises:
            SchemaError: it names nothing, or several.
            NotFoundError: there is no such commit.
        """
        wanted = parse_ref(text)
        if wanted.prefix:
            digest = self._by_prefix(wanted, text)
        elif wanted.number is not None:
            digest = self._by_number(wanted, text)
        else:
            digest = self._by_name(wanted, text)
        for _ in range(wanted.back):
            parents = self.entry(digest).parents
            if not parents:
                raise NotFoundError(f"{text}: {short(digest)} has no parent")
            digest = parents[0]
        return digest

    def _by_name(self, wanted: Wanted, text: str) -> str:
        refs = {one.tag: one for one in self.names(wanted.model)}
        if wanted.tag:
            if wanted.tag not in refs:
                known = ", ".join(sorted(refs)) or "none"
                raise NotFoundError(f"{text[:120]}: no such tag or branch (there are: {known})")
            return refs[wanted.tag].digest
        if BRANCH in refs:
            return refs[BRANCH].digest
        if len(refs) == 1:
            return next(iter(refs.values())).digest
        if refs:
            raise SchemaError(
                f"{text}: which one? {', '.join(f'{wanted.model}:{tag}' for tag in sorted(refs))}"
            )
        if looks_like_digest(wanted.model):
            return self._by_prefix(Wanted(model="", prefix=wanted.model), text)
        raise unknown(text)

    def _by_number(self, wanted: Wanted, text: str) -> str:
        starts = [one.digest for one in self.names(wanted.model)]
        for entry in self.log(starts):
            if entry.number == wanted.number and entry.model == wanted.model:
                return entry.digest
        raise NotFoundError(
            f"{text[:120]}: no version {wanted.number} (see `liberatai models log {wanted.model}`)"
        )

    def _by_prefix(self, wanted: Wanted, text: str) -> str:
        found = []
        for digest in self.layout.blobs():
            if not digest.startswith(f"sha256:{wanted.prefix}"):
                continue
            try:
                content = self.layout.json(digest)
                _, commit = self.parsed(digest, content)
            except LiberataiError as error:
                if isinstance(error, DigestError) and len(wanted.prefix) == 64:
                    raise
                continue
            if wanted.model in ("", commit.model):
                found.append(digest)
        if not found:
            raise unknown(text)
        if len(found) > 1:
            raise SchemaError(f"{text[:80]}: {len(found)} commits begin so: give more of the digest")
        return found[0]

    def set_ref(
        self, model: str, tag: str, digest: str, *, kind: str, expected: str | None = "", force: bool = False
    ) -> None:
        """Let a tag or a branch name a commit.

        Args:
            model: of the name.
            tag: the name.
            digest: of the commit, which must be one of this model.
            kind: "branch" or "tag".
            expected: digest that the name must have now; None: it must be new; "": a tag must be new or the
                same, a branch may only go forward.
            force: set it, whatever it named.

        Raises:
            StateError: it names something else: somebody was faster, or it would go back.
            SchemaError: the commit is one of another model, or the name is impossible.
        """
        loaded = self.read(digest)
        if loaded.commit.model != model:
            raise SchemaError(f"commit {short(digest)} is one of {loaded.commit.model}, not of {model}")
        name = full_ref(model, tag)

        def decide(refs: dict[str, Descriptor]) -> dict[str, Descriptor]:
            self._require(name, refs.get(name), digest, kind, expected, force=force)
            refs[name] = _described(loaded, kind)
            return refs

        self._update(decide)

    def _require(
        self, name: str, now: Descriptor | None, wanted: str, kind: str, expected: str | None, *, force: bool
    ) -> None:
        found = now.digest if now else None
        if force or found == wanted:
            return
        if expected != "":
            if found != expected:
                raise StateError(
                    f"{name} names {short(found) if found else 'nothing'} now, not "
                    f"{short(expected) if expected else 'nothing'}: somebody was faster; look, and try again"
                )
            return
        if found is None:
            return
        if kind == "tag":
            raise StateError(f"{name} names {short(found)} already: tags stay (--force moves one)")
        if not self.is_ancestor(found, wanted):
            raise StateError(
                f"{name} is at {short(found)}, which {short(wanted)} does not come from: somebody else "
                "committed; merge it (`liberatai models merge`), or use --force"
            )

    def is_ancestor(self, older: str, younger: str) -> bool:
        """Whether a commit is the other one, or what it comes from."""
        return older == younger or any(digest == older for digest in self.history.before(younger))

    def remove_ref(self, model: str, tag: str) -> None:
        """Take a tag or a branch away; its commits stay until they are collected.

        Raises:
            NotFoundError: there is none.
        """
        name = full_ref(model, tag)

        def decide(refs: dict[str, Descriptor]) -> dict[str, Descriptor]:
            if refs.pop(name, None) is None:
                raise NotFoundError(f"{name}: no such tag or branch")
            return refs

        self._update(decide)

    def remote(self, place: str) -> str | None:
        """Return the commit that was last seen at a place of a registry; None if none was."""
        found = self.layout.refs().get(f"{REMOTE}{place}")
        return found.digest if found else None

    def set_remote(self, place: str, loaded: Loaded) -> None:
        """Note what was seen at a place of a registry."""

        def decide(refs: dict[str, Descriptor]) -> dict[str, Descriptor]:
            refs[f"{REMOTE}{place}"] = _described(loaded, "remote")
            return refs

        self._update(decide)

    def _update(self, decide: Callable[[dict[str, Descriptor]], dict[str, Descriptor]]) -> None:
        def with_signatures(refs: dict[str, Descriptor]) -> dict[str, Descriptor]:
            after = {name: one for name, one in decide(refs).items() if one.note(KIND) != "signature"}
            named = {one.digest for one in after.values() if one.note(KIND) in ("branch", "tag")}
            for digest in sorted(named):
                # Where registries have no referrers API, signatures stand under this tag; so do they here.
                content = encode(self.referrers.of(digest))
                self.layout.put([content])
                after[digest.replace(":", "-")] = describe(content, INDEX, {KIND: "signature"})
            return after

        self.layout.update(with_signatures)

    # --- writing -----------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the collector away while blobs are put that nothing names yet."""
        with self.layout.writing():
            yield

    def write(
        self,
        draft: Commit,
        layers: Mapping[str, Sequence[Layer]],
        *,
        branch: str | None = BRANCH,
        expected: str | None = "",
        force: bool = False,
    ) -> Loaded:
        """Store a commit and let a branch name it: whole, or not at all.

        Args:
            draft: the commit, digests of its variants' manifests still open.
            layers: of every variant, by name.
            branch: that goes to it; None: only its digest names it.
            expected: what the branch must name now, as of `set_ref`.
            force: move the branch, whatever it named.

        Returns:
            The commit as it was stored; the same one again gives the same digest.

        Raises:
            NotFoundError: a parent or a layer is neither given nor here.
            StateError: the branch is elsewhere; nothing names the commit.
            DiskError: the disk refuses.
        """
        if draft.model.startswith(REMOTE):
            raise SchemaError(f"model {draft.model}: names that begin with {REMOTE} are for registries")
        require_model(draft.model)
        with self.writing():
            for parent in draft.parents:
                self.read(parent)
            blobs: dict[str, bytes] = {}
            variants = tuple(
                self._variant(draft, variant, layers[variant.name], blobs) for variant in draft.variants
            )
            commit = msgspec.structs.replace(draft, variants=variants)
            commit = decode(encode(commit), Commit, f"commit of {draft.model}")  # as readers will have it
            documents = []
            for content, media_type, path in cards.documents(commit):
                documents.append(_keep(blobs, content, media_type, {TITLE: path, FILEPATH: path}))
            own, config = manifest_of(commit, tuple(documents))
            index = index_of(commit, own)
            described = describe(index, INDEX)
            _keep(blobs, config, COMMIT_CONFIG)
            _keep(blobs, own, MANIFEST)
            key = trust.own_key(self.folder)
            signed, parts = signing.signature_manifest(
                signing.sign(key, described.digest, commit.model), described
            )
            for part in parts:
                _keep(blobs, part, ENVELOPE)
            note = msgspec.structs.replace(_keep(blobs, signed, MANIFEST), artifact_type=SIGNATURE)
            beside, referrers = self.referrers.file(described.digest, [note])
            _keep(blobs, referrers, INDEX)
            self.layout.put_named({**blobs, described.digest: index}, {beside: referrers})
            if branch is not None:
                self.set_ref(
                    commit.model, branch, described.digest, kind="branch", expected=expected, force=force
                )
        loaded = self.read(described.digest)
        self.history.add([entry_of(loaded.digest, commit, loaded.signer.key)])
        return loaded

    def _variant(
        self, draft: Commit, variant: Variant, layers: Sequence[Layer], blobs: dict[str, bytes]
    ) -> Variant:
        for one, content in layers:
            if content is not None:
                blobs[one.digest] = content
            elif not self.layout.has(one.digest):
                raise NotFoundError(f"{draft.model} {variant.name}: {one.digest} is not in {self.folder}")
        described = tuple(one for one, _ in layers)
        structure = variant.structure
        config = model_config(
            draft.model,
            structure.family if structure else "",
            structure.parameters if structure else 0,
            described,
        )
        manifest = variant_manifest(_keep(blobs, config, MODEL_CONFIG), described)
        made = _keep(blobs, manifest, MANIFEST)
        return msgspec.structs.replace(variant, manifest=made.digest, size=made.size)

    def layers(self, variant: Variant) -> tuple[Descriptor, ...]:
        """Return what a variant consists of, its manifest verified.

        Raises:
            NotFoundError, DigestError, SchemaError: it is absent or damaged.
        """
        return decode(self.layout.json(variant.manifest), Manifest, variant.name).layers


def now_s() -> int:
    """Return the time that a commit carries: advice only."""
    return int(time.time())


def _keep(
    blobs: dict[str, bytes], content: bytes, media_type: str, notes: dict[str, str] | None = None
) -> Descriptor:
    """Note a blob that is to be put, and return its descriptor."""
    made = describe(content, media_type, notes)
    blobs[made.digest] = content
    return made


def _described(loaded: Loaded, kind: str) -> Descriptor:
    return msgspec.structs.replace(
        loaded.descriptor, annotations={KIND: kind, f"{OURS}model": loaded.commit.model}
    )
