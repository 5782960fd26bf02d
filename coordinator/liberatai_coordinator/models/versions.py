"""A job's versions: made, written down, read back, and what devices must fetch to follow them.

Blobs first, then one row in the ledger: a version is complete and verifiable, or absent (promise P3).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import numpy as np

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models import aggregation, ensembles, members
from liberatai_coordinator.models.aggregation import Advanced
from liberatai_coordinator.models.ensembles import combine
from liberatai_coordinator.models.members import Member, Public, derive_seed
from liberatai_coordinator.models.retention import collect
from liberatai_coordinator.rounds.catch_up import Path, Way, choose, size_of
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import (
    Ensemble,
    Manifest,
    MemberRecord,
    StepRecord,
    decode_manifest,
    encode_manifest,
    version_id,
)
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import VersionRow
from liberatai_core.aggregator.server_optimizer import ServerState
from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress, smallest_bytes
from liberatai_core.compressor.drawn import REACH_BITS, cut, draw
from liberatai_core.contract.messages import BlobRef, Step, weights_name
from liberatai_core.contract.topics import blob_id, blob_id_of
from liberatai_core.errors import DataError, NotFoundError
from liberatai_core.learning.families import initial_weights
from liberatai_core.sparsifier.merge import exact_deltas
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector, digest, from_bytes, to_bytes

MAX_STEPS = 512
"""Files of all chains together: a Head names every one of them and must fit one message."""

MAX_CHAIN_FILES = 32
"""Files of one chain: half of what a device's path may have (`catch_up.MAX_FILES`), so that going on from its
keyframe is always possible. Only chains whose deltas have no exact sum grow so long."""

GROUP_REACH_BITS = (REACH_BITS, 3, 2, 1)
"""How finely the weights of nested members are drawn, the first that fits counts: slices of a draw travel as
levels, 11, 5, 4 or 3 bits each at most."""

START_BITS = 8.0
"""Per weight of the file by which a commit's weights come to devices, if their storage allows: more changes
no answer."""

RENEWED_SHARE = 0.6
"""Share of the tightest storage that a renewed keyframe may take: the rest holds the deltas to come."""

RENEWALS = (
    *((1.0, levels) for levels in (63, 31, 15, 7, 3)),
    *((density, 3) for density in (0.5, 0.25)),
    *((density, 1) for density in (0.1, 0.05, 0.02, 0.005)),
)
"""(density, levels) of a delta that leads from a kept keyframe to the trained part, the best one first: from
seven bits per value to a fourteenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One structure of one version, without its weights.

    Attributes:
        digest: 32-byte SHA-256 of the devices' view.
        view: SHA-256 (hex) of the blob that holds it.
        delta: what leads here from the version before; None if a keyframe does.
    """

    digest: bytes
    view: str
    delta: Step | None


@dataclass(slots=True, kw_only=True)
class Current:
    """The newest version in memory.

    Attributes:
        chains: per structure, keyframe first, then what leads from there: usually one merged delta.
        deltas: per structure, what leads here from the version before; absent if a keyframe does.
        round: the round that made it; 0 for initial weights.
    """

    number: int
    id: str
    members: dict[str, Member]
    chains: dict[str, Path]
    ensemble: Ensemble
    deltas: dict[str, Step] = field(default_factory=dict)
    round: int = 0


@dataclass(slots=True, kw_only=True)
class Versions:
    """The versions of one job.

    Attributes:
        first: number in the ledger of this job's version 0; an earlier job of the same name may have some.
            Everywhere else a job counts its versions from 0.
        newest: in memory; None before the first one.
        shas: blob id -> SHA-256 (hex) of every file that devices may need.
        history: version -> structure id -> mark.
    """

    job: JobSpec
    ledger: Ledger
    repository: Repository
    first: int = 0
    newest: Current | None = None
    shas: dict[str, str] = field(default_factory=dict)
    history: dict[int, dict[str, Mark]] = field(default_factory=dict)
    _digests: dict[bytes, bytes] = field(default_factory=dict)
    _merged: dict[tuple[str, int], Path] = field(default_factory=dict)
    _loose: dict[str, bytes] = field(default_factory=dict)

    @property
    def now(self) -> Current:
        """The newest version, or DataError if there is none."""
        if self.newest is None:
            raise DataError(f"job {self.job.name} has no version yet")
        return self.newest

    def start(
        self,
        structures: Mapping[str, Structure],
        keyframe_bytes: Mapping[str, int],
        public: Public,
        weights: Mapping[str, Vector] | None = None,
    ) -> None:
        """Make version 0.

        Args:
            structures: of the job, by id.
            keyframe_bytes: per structure, what its first file may take.
            public: the coordinator's own data.
            weights: per structure, what it begins with; None: seeded initial weights, as the recipe that
                draws them on every device.
        """
        members: dict[str, Member] = {}
        chains: dict[str, Path] = {}
        blobs: list[bytes] = []
        if weights is None:
            files = self._first_keyframes(structures, keyframe_bytes, self._given(structures))
        else:
            files = {
                sid: compress(weights[sid], structures[sid], keyframe_bytes[sid], max_bits=START_BITS)
                for sid in sorted(structures)
            }
        for sid, artifact in files.items():
            structure = structures[sid]
            view = restore(artifact, structure)
            members[sid] = aggregation.first(self.job, structure, view)
            if weights is not None:  # what the file lost follows with the deltas
                members[sid] = replace(members[sid], master=weights[sid])
            chains[sid] = (self._step(0, artifact, view),)
            blobs.append(artifact)
        ensemble = ensembles.combine(self.job, members, public)
        self._write(Current(number=0, id="", members=members, chains=chains, ensemble=ensemble), (), blobs)

    def _first_keyframes(
        self,
        structures: Mapping[str, Structure],
        keyframe_bytes: Mapping[str, int],
        given: Mapping[str, Vector],
    ) -> dict[str, bytes]:
        """Return the files of version 0, sorted by structure; members of a group start with shared values."""
        seeds = {sid: derive_seed(self.job.seed, f"initial|{sid}", 0) for sid in sorted(structures)}
        starts = {sid: initial_weights(structures[sid], self.job.data, seed) for sid, seed in seeds.items()}
        files = {
            sid: _first_keyframe(starts[sid], structures[sid], seed, keyframe_bytes[sid])
            for sid, seed in seeds.items()
        }
        for group in aggregation.groups(self.job, structures.values()):
            large = group.largest
            for bits in GROUP_REACH_BITS:
                recipe = draw(starts[large], structures[large], seeds[large], reach_bits=bits)
                shared = {large: recipe}
                for sid, places in list(group.places.items())[1:]:
                    own = draw(starts[sid], structures[sid], seeds[sid])
                    shared[sid] = cut(recipe, structures[large], own, structures[sid], places)
                if all(len(content) <= keyframe_bytes[sid] for sid, content in shared.items()):
                    break
            files |= {
                sid: content
                if len(content) <= keyframe_bytes[sid]
                else compress(restore(content, structures[sid]), structures[sid], keyframe_bytes[sid])
                for sid, content in shared.items()
            }
        return files | {
            sid: compress(weights, structures[sid], keyframe_bytes[sid]) for sid, weights in given.items()
        }

    def _given(self, structures: Mapping[str, Structure]) -> dict[str, Vector]:
        """Return the weights that a committed model gives to structures of a network that it has.

        Raises:
            NotFoundError: no such model or version, or none of its structures is the network of one here.
        """
        named = self.job.head.backbone
        if named is None:
            return {}
        model, _, number = named.partition("@")
        row = self.ledger.versions.get(model, int(number) if number else "latest")
        records = decode_manifest(row.manifest).structures.values()
        found = {
            sid: load_member(self.repository, record).view
            for sid, structure in structures.items()
            for record in records
            if (record.structure.family, record.structure.tensors) == (structure.family, structure.tensors)
        }
        if not found:
            raise NotFoundError(f"head.backbone: {named} has no network of this job's tensors")
        return found

    def commit(
        self,
        advanced: Advanced,
        number: int,
        updates: Sequence[bytes],
        storage_bytes: Mapping[str, int],
        keyframe_bytes: Mapping[str, int],
        public: Public,
    ) -> str:
        """Write the version that round `number` made, and return its id.

        Args:
            advanced: what the aggregation made of the updates.
            number: the round.
            updates: ids of the frozen set.
            storage_bytes: per structure, what its chain may take on the tightest device.
            keyframe_bytes: per structure, what a new keyframe may take.
            public: the coordinator's own data.
        """
        chains, deltas, blobs, members = self._extend(advanced, storage_bytes, keyframe_bytes)
        renewed = any(member is not advanced.members[sid] for sid, member in members.items())
        made = Current(
            number=self.now.number + 1,
            id="",
            members=members,
            chains=chains,
            deltas=deltas,
            # What devices get may be coarser than what was aggregated; the ensemble is one of what they get.
            ensemble=combine(self.job, members, public) if renewed else advanced.ensemble,
            round=number,
        )
        self._write(made, updates, blobs)
        return made.id

    def _write(self, made: Current, updates: Sequence[bytes], blobs: Iterable[bytes]) -> None:
        with self.repository.holding():
            records = self._put(made, updates, blobs)
        self.newest = made
        self._mark(made.number, records)

    def _put(
        self, made: Current, updates: Sequence[bytes], blobs: Iterable[bytes]
    ) -> Mapping[str, MemberRecord]:
        """Write a version down, its files first, and name it."""
        files = list(blobs)
        for content in files:
            self.shas[blob_id(content)] = hashlib.sha256(content).hexdigest()

        def keep(content: bytes) -> str:
            files.append(content)
            return hashlib.sha256(content).hexdigest()

        records = {sid: self._record(made, sid, keep) for sid in made.members}
        parent = self.newest.id if self.newest else None
        manifest = Manifest(
            model=self.job.name,
            number=self.first + made.number,
            parent=parent,
            round=made.round,
            data=self.job.data,
            structures=records,
            updates=tuple(sorted(update.hex() for update in updates)),
            ensemble=made.ensemble,
        )
        content = encode_manifest(manifest)
        self.repository.put_all([*files, content])
        row = VersionRow(
            model=self.job.name,
            number=manifest.number,
            id=version_id(manifest),
            parent=parent,
            manifest=content,
            created_s=clock.wall(),
        )
        self.ledger.versions.add(row)
        made.id = row.id
        return records

    def _mark(self, number: int, records: Mapping[str, MemberRecord]) -> None:
        """Note a version that exists now; what was merged for the one before is let go."""
        self.history[number] = {
            sid: Mark(
                digest=bytes.fromhex(record.digest),
                view=record.view,
                delta=None if record.delta is None else step_from(record.delta),
            )
            for sid, record in records.items()
        }
        for record in records.values():
            for told in (record.digest, *(step.digest for step in record.files)):
                self._digests[weights_name(bytes.fromhex(told))] = bytes.fromhex(told)
        self._merged, self._loose = {}, {}

    def _step(self, version: int, content: bytes, view: Vector) -> Step:
        """Return the link of a chain that `content` makes; manifests need the whole digest of its weights."""
        full = digest(view)
        self._digests[weights_name(full)] = full
        ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
        return Step(version=version, blob=ref, digest=weights_name(full))

    def _record(self, made: Current, sid: str, keep: Callable[[bytes], str]) -> MemberRecord:
        """Return what the manifest says of a member; `keep` takes its files, and returns their SHA-256."""
        member, delta = made.members[sid], made.deltas.get(sid)

        def record(step: Step) -> StepRecord:
            return StepRecord(
                version=step.version,
                blob=self.shas[step.blob.blob],
                size=step.blob.size_bytes,
                digest=self._digests[step.digest].hex(),
            )

        keyframe, *deltas = [record(step) for step in made.chains[sid]]
        return MemberRecord(
            structure=member.structure,
            master=keep(to_bytes(member.master)),
            view=keep(to_bytes(member.view)),
            digest=digest(member.view).hex(),
            keyframe=keyframe,
            deltas=tuple(deltas),
            class_counts=tuple(int(c) for c in member.class_counts),
            optimizer=tuple(
                keep(to_bytes(moment))
                for moment in (member.optimizer.first, member.optimizer.second)
                if moment.size
            ),
            delta=None if delta is None else record(delta),
        )

    def restore(self, row: VersionRow) -> None:
        """Read a version back, every file verified.

        Raises:
            NotFoundError, DigestError: a file is missing or damaged.
        """
        manifest = decode_manifest(row.manifest)
        records = manifest.structures
        members = {sid: load_member(self.repository, record) for sid, record in records.items()}
        for older in self.ledger.versions.all(self.job.name, first=self.first):
            if older.number <= row.number and not older.collected:
                marked = decode_manifest(older.manifest).structures
                self._mark(older.number - self.first, marked)
                self.shas |= {
                    blob_id_of(bytes.fromhex(one.blob)): one.blob
                    for record in marked.values()
                    for one in record.files
                }
        chains = {
            sid: tuple(step_from(step) for step in (record.keyframe, *record.deltas))
            for sid, record in records.items()
        }
        deltas = {sid: step_from(r.delta) for sid, r in records.items() if r.delta is not None}
        ensemble = manifest.ensemble
        self.newest = Current(
            number=row.number - self.first,
            id=row.id,
            members=members,
            chains=chains,
            deltas=deltas,
            ensemble=ensemble,
            round=manifest.round,
        )

    def stored(self) -> VersionRow | None:
        """Return this job's newest version in the ledger; None before the first one."""
        return self.ledger.versions.newest(self.job.name, first=self.first)

    def collect(self, needed: AbstractSet[int]) -> int:
        """Remove the files of old versions, and return how many versions lost theirs; may take a while.

        Args:
            needed: versions that devices come from, as their paths and invitations have them.

        Raises:
            DiskError: the disk refuses; the next call tries again.
        """
        in_ledger = {self.first + number for number in needed}
        gone = collect(self.ledger, self.repository, self.job.name, self.job.keep, in_ledger)
        for number in gone:
            self.history.pop(number - self.first, None)
        return len(gone)

    def content(self, blob: str) -> bytes:
        """Return a file that devices may need, by its blob id."""
        return self._loose[blob] if blob in self._loose else self.repository.get(self.shas[blob])

    def recall(self, sid: str, way: Way) -> bool:
        """Make the merged files of a way that a device was told before a restart again, if that is possible.

        Returns:
            Whether `content` has all of its files now.
        """
        missing = {step.blob.blob for step in way.steps} - self.shas.keys() - self._loose.keys()
        before = next((step for step in way.path if step.digest == way.held), None)
        if missing and before is not None:
            number = way.steps[-1].version
            if self._knows(sid, before) and sid in self.history.get(number, {}):
                member = replace(self.now.members[sid], view=self._view(sid, number))
                found = self._files(sid, before.version, number, member)
                self._loose |= {step.blob.blob: content for step, content in found}
        return missing <= self._loose.keys()

    def way(self, sid: str, path: Path, storage_bytes: int) -> Way:
        """Return how a device that holds `path` gets to the newest version of a structure.

        Args:
            sid: the structure.
            path: what the device surely holds, of whichever structure; empty: nothing.
            storage_bytes: what its files may take; 0: no limit.
        """
        newest = self.now.chains[sid]
        if not path or not self._knows(sid, path[-1]):
            return choose((), newest)
        since = path[-1].version
        return choose(
            path,
            newest,
            merged=self._merge(sid, since),
            singles=self._singles(sid, since),
            storage_bytes=storage_bytes,
        )

    def _knows(self, sid: str, step: Step) -> bool:
        """Whether a device's weights are those of a version; a ledger from a backup may know fewer."""
        mark = self.history.get(step.version, {}).get(sid)
        return mark is not None and weights_name(mark.digest) == step.digest

    def _view(self, sid: str, version: int) -> Vector:
        return from_bytes(self.repository.get(self.history[version][sid].view))

    def _merge(self, sid: str, since: int) -> Path:
        """Return the exact files from a version to the newest one, made once for all; () if none do."""
        key = (sid, since)
        if key not in self._merged and since != self.now.number:
            found = self._files(sid, since, self.now.number, self.now.members[sid])
            self._loose |= {step.blob.blob: content for step, content in found}
            self._merged[key] = tuple(step for step, _ in found)
        return self._merged.get(key, ())

    def _files(self, sid: str, since: int, number: int, member: Member) -> list[tuple[Step, bytes]]:
        """Return files that turn a version's weights into a member's view, bit for bit, if any do."""
        before = self._view(sid, since)
        trained = members.trained_part(self.job, member.structure)
        after = trained.gather(member.view)
        if to_bytes(trained.replaced(before, after)) != to_bytes(member.view):
            return []  # a renewed keyframe lies between, which changed all weights
        found, view = [], before
        for content in exact_deltas(trained.gather(before), after, trained.part) or ():
            view = trained.added(view, densify(content, trained.part))
            found.append((self._step(number, content, view), content))
        return found

    def _singles(self, sid: str, since: int) -> Path | None:
        between = [self.history.get(number) for number in range(since + 1, self.now.number + 1)]
        steps = [None if marks is None else marks[sid].delta for marks in between]
        return None if None in steps else tuple(step for step in steps if step is not None)

    def _extend(
        self, advanced: Advanced, storage_bytes: Mapping[str, int], keyframe_bytes: Mapping[str, int]
    ) -> tuple[dict[str, Path], dict[str, Step], list[bytes], dict[str, Member]]:
        """Lead every keyframe to the new version; where that outgrows the devices, make a new keyframe."""
        now = self.now
        chains: dict[str, Path] = {}
        deltas: dict[str, Step] = {}
        blobs, members = [], dict(advanced.members)
        for sid, content in advanced.keyframes.items():
            blobs.append(content)
            chains[sid] = (self._step(now.number + 1, content, members[sid].view),)
        for sid in sorted(advanced.refreshed & advanced.deltas.keys()):
            members[sid], chains[sid], content = self._whole(members[sid], keyframe_bytes[sid])
            blobs.append(content)
        for sid, delta in advanced.deltas.items():
            if sid in advanced.refreshed:
                continue
            member = members[sid]
            step = self._step(now.number + 1, delta, member.view)
            chain, contents = self._lead(sid, step, delta, member)
            taken = size_of(chain)
            longest = min(MAX_CHAIN_FILES, MAX_STEPS // len(members))
            if len(chain) <= longest and taken <= storage_bytes.get(sid, taken):
                blobs += [delta, *contents]
                chains[sid], deltas[sid] = chain, step
                continue
            room = int(storage_bytes[sid] * RENEWED_SHARE) if sid in storage_bytes else 0
            members[sid], chains[sid], content = self._renewed(sid, member, room, keyframe_bytes[sid])
            blobs.append(content)
        return chains, deltas, blobs, members

    def _lead(self, sid: str, step: Step, delta: bytes, member: Member) -> tuple[Path, list[bytes]]:
        """Return the way from the keyframe to the new version, and the contents of the files that are new.

        It is merged from the keyframe, or from as early in the chain as an exact difference goes.
        """
        old = self.now.chains[sid]
        for kept in range(1, len(old)):
            if self._knows(sid, old[kept - 1]):  # not the middle of a merged delta of several files
                found = self._files(sid, old[kept - 1].version, step.version, member)
                if found:
                    return (*old[:kept], *(one for one, _ in found)), [content for _, content in found]
        return (*old, step), [delta]

    def _whole(self, member: Member, room: int) -> tuple[Member, Path, bytes]:
        """Return a member whose devices get all of its weights anew, its chain and the file."""
        structure = member.structure
        wished = int(structure.parameters * self.job.compress.renewed_bits / 8) + 512
        content = compress(member.master, structure, max(min(wished, room), smallest_bytes(structure)))
        member = replace(member, view=restore(content, structure))
        return member, (self._step(self.now.number + 1, content, member.view),), content

    def _renewed(self, sid: str, member: Member, room: int, first_bytes: int) -> tuple[Member, Path, bytes]:
        """Return a member, its chain and the new file, where the chain outgrew its devices.

        Where all weights are trained, the file is a new keyframe. Otherwise the old keyframe stays, with the
        weights that are never trained: quantised again, they would be worse for good. From there one lossy
        delta leads to the trained part.

        Args:
            sid: the structure.
            member: its newest state.
            room: what the chain may take on the tightest device; 0: no limit.
            first_bytes: what the first keyframe was allowed.
        """
        bits, number = self.job.compress.renewed_bits, self.now.number + 1
        trained = members.trained_part(self.job, member.structure)
        wished = int(trained.part.parameters * bits / 8) + 512
        if trained.gain is None:
            content = compress(member.master, member.structure, min(wished, max(first_bytes, room or wished)))
            member = replace(member, view=restore(content, member.structure))
            return member, (self._step(number, content, member.view),), content
        keyframe = self.now.chains[sid][0]
        view = self._view(sid, keyframe.version)
        behind = trained.gather(member.master) - trained.gather(view)
        budget = min(wished, room - keyframe.blob.size_bytes) if room else wished
        content = _lossy_delta(behind, trained.part, budget)
        member = replace(member, view=trained.added(view, densify(content, trained.part)))
        return member, (keyframe, self._step(number, content, member.view)), content


def _lossy_delta(behind: Vector, part: Structure, budget_bytes: int) -> bytes:
    """Return the best delta that fits a budget; the shortest one where none does."""
    delta = b""
    for density, levels in RENEWALS:
        _, delta = sparsify(init(part.parameters), behind, part, density, levels=levels, power_of_two=True)
        if len(delta) <= budget_bytes:
            break
    return delta


def _first_keyframe(weights: Vector, structure: Structure, seed: int, budget_bytes: int) -> bytes:
    """Return the file of a new model; what is not drawn travels compressed if it is too much otherwise."""
    recipe = draw(weights, structure, seed)
    return recipe if len(recipe) <= budget_bytes else compress(weights, structure, budget_bytes)


def step_from(record: StepRecord) -> Step:
    """Return what devices are told of a file in a manifest."""
    ref = BlobRef(blob=blob_id_of(bytes.fromhex(record.blob)), size_bytes=record.size)
    return Step(version=record.version, blob=ref, digest=weights_name(bytes.fromhex(record.digest)))


def load_member(repository: Repository, record: MemberRecord) -> Member:
    """Return a member from its record, every blob verified."""
    empty = np.zeros(0, dtype=np.float32)
    moments = [from_bytes(repository.get(sha)) for sha in record.optimizer]
    first, second = [*moments, empty, empty][:2]
    return Member(
        structure=record.structure,
        master=from_bytes(repository.get(record.master)),
        view=from_bytes(repository.get(record.view)),
        class_counts=np.array(record.class_counts, dtype=np.float64),
        optimizer=ServerState(first, second),
    )
