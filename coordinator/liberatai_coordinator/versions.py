"""A job's versions: made, written down, read back, and what devices must fetch to follow them.

Blobs first, then one row in the ledger: a version is complete and verifiable, or absent (promise P3).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from liberatai_coordinator import aggregation
from liberatai_coordinator.aggregation import Advanced, Ensemble, Member, Public, derive_seed
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.ledger import Ledger, VersionRow
from liberatai_coordinator.repository import (
    EnsembleRecord,
    Manifest,
    Repository,
    StepRecord,
    decode_manifest,
    encode_manifest,
    version_id,
)
from liberatai_coordinator.repository import Member as MemberRecord
from liberatai_core.aggregator.server_optimizer import ServerState
from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress
from liberatai_core.contract.messages import BlobRef, Step
from liberatai_core.contract.topics import blob_id, blob_id_of
from liberatai_core.errors import DataError
from liberatai_core.learning.families import initial_weights
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector, digest, from_bytes, to_bytes

MAX_STEPS = 512
"""Files of all chains together: a Head names every one of them and must fit one message."""

RENEWED_SHARE = 0.6
"""Share of the tightest storage that a renewed keyframe may take: the rest holds the deltas to come."""


@dataclass(slots=True, kw_only=True)
class Current:
    """The newest version in memory.

    Attributes:
        chains: per structure, keyframe first, then deltas.
        round: the round that made it; 0 for initial weights.
    """

    number: int
    id: str
    members: dict[str, Member]
    chains: dict[str, tuple[Step, ...]]
    ensemble: Ensemble
    round: int = 0


@dataclass(slots=True, kw_only=True)
class Versions:
    """The versions of one job.

    Attributes:
        newest: in memory; None before the first one.
        shas: blob id -> SHA-256 (hex) of every file in the newest chains.
    """

    job: JobSpec
    ledger: Ledger
    repository: Repository
    newest: Current | None = None
    shas: dict[str, str] = field(default_factory=dict)

    @property
    def now(self) -> Current:
        """The newest version, or DataError if there is none."""
        if self.newest is None:
            raise DataError(f"job {self.job.name} has no version yet")
        return self.newest

    def start(
        self, structures: Mapping[str, Structure], keyframe_bytes: Mapping[str, int], public: Public
    ) -> None:
        """Make version 0: seeded initial weights, compressed into every structure's budget."""
        members: dict[str, Member] = {}
        chains: dict[str, tuple[Step, ...]] = {}
        blobs: list[bytes] = []
        for sid, structure in sorted(structures.items()):
            seed = derive_seed(self.job.seed, f"initial|{sid}", 0)
            artifact = compress(
                initial_weights(structure, self.job.data, seed), structure, keyframe_bytes[sid]
            )
            view = restore(artifact, structure)
            members[sid] = aggregation.first(self.job, structure, view)
            chains[sid] = (step_of(0, artifact, view),)
            blobs.append(artifact)
        ensemble = aggregation.combine(self.job, members, public)
        self._write(Current(number=0, id="", members=members, chains=chains, ensemble=ensemble), (), blobs)

    def commit(
        self,
        advanced: Advanced,
        number: int,
        updates: Sequence[bytes],
        storage_bytes: Mapping[str, int],
        keyframe_bytes: Mapping[str, int],
    ) -> str:
        """Write the version that round `number` made, and return its id.

        Args:
            advanced: what the aggregation made of the updates.
            number: the round.
            updates: ids of the frozen set.
            storage_bytes: per structure, what its chain may take on the tightest device.
            keyframe_bytes: per structure, what a new keyframe may take.
        """
        chains, blobs, members = self._extend(advanced, storage_bytes, keyframe_bytes)
        made = Current(
            number=self.now.number + 1,
            id="",
            members=members,
            chains=chains,
            ensemble=advanced.ensemble,
            round=number,
        )
        self._write(made, updates, blobs)
        return made.id

    def _write(self, made: Current, updates: Sequence[bytes], blobs: Iterable[bytes]) -> None:
        for content in blobs:
            self.shas[blob_id(content)] = self.repository.put(content)
        records = {sid: self._record(member, made.chains[sid]) for sid, member in made.members.items()}
        parent = self.newest.id if self.newest else None
        manifest = Manifest(
            model=self.job.name,
            number=made.number,
            parent=parent,
            round=made.round,
            data=self.job.data,
            structures=records,
            updates=tuple(sorted(update.hex() for update in updates)),
            ensemble=msgspec.convert(msgspec.structs.asdict(made.ensemble), EnsembleRecord),
        )
        content = encode_manifest(manifest)
        self.repository.put(content)
        row = VersionRow(
            model=self.job.name,
            number=made.number,
            id=version_id(manifest),
            parent=parent,
            manifest=content,
            created_s=time.time(),
        )
        self.ledger.add_version(row)
        made.id = row.id
        self.newest = made

    def _record(self, member: Member, chain: tuple[Step, ...]) -> MemberRecord:
        keyframe, *deltas = [
            StepRecord(
                version=step.version,
                blob=self.shas[step.blob.blob],
                size=step.blob.size_bytes,
                digest=step.digest.hex(),
            )
            for step in chain
        ]
        return MemberRecord(
            structure=member.structure,
            master=self.repository.put(to_bytes(member.master)),
            view=self.repository.put(to_bytes(member.view)),
            digest=digest(member.view).hex(),
            keyframe=keyframe,
            deltas=tuple(deltas),
            class_counts=tuple(int(c) for c in member.class_counts),
            optimizer=tuple(
                self.repository.put(to_bytes(moment))
                for moment in (member.optimizer.first, member.optimizer.second)
                if moment.size
            ),
        )

    def restore(self, row: VersionRow) -> None:
        """Read a version back, every file verified.

        Raises:
            NotFoundError, DigestError: a file is missing or damaged.
        """
        manifest = decode_manifest(row.manifest)
        records = manifest.structures
        members = {sid: load_member(self.repository, record) for sid, record in records.items()}
        for record in records.values():
            for kept in (record.keyframe, *record.deltas):
                self.shas[blob_id_of(bytes.fromhex(kept.blob))] = kept.blob
        chains = {
            sid: tuple(
                Step(
                    version=step.version,
                    blob=BlobRef(blob=blob_id_of(bytes.fromhex(step.blob)), size_bytes=step.size),
                    digest=bytes.fromhex(step.digest),
                )
                for step in (record.keyframe, *record.deltas)
            )
            for sid, record in records.items()
        }
        ensemble = msgspec.convert(msgspec.structs.asdict(manifest.ensemble), Ensemble)
        self.newest = Current(
            number=row.number,
            id=row.id,
            members=members,
            chains=chains,
            ensemble=ensemble,
            round=manifest.round,
        )

    def content(self, blob: str) -> bytes:
        """Return a file of the newest chains by its blob id."""
        return self.repository.get(self.shas[blob])

    def _extend(
        self, advanced: Advanced, storage_bytes: Mapping[str, int], keyframe_bytes: Mapping[str, int]
    ) -> tuple[dict[str, tuple[Step, ...]], list[bytes], dict[str, Member]]:
        """Append the deltas to the chains; where a chain outgrows its devices, start a new keyframe."""
        now = self.now
        chains: dict[str, tuple[Step, ...]] = {}
        blobs, members = [], dict(advanced.members)
        for sid, delta in advanced.deltas.items():
            old, member = now.chains[sid], members[sid]
            taken = sum(step.blob.size_bytes for step in old) + len(delta)
            if len(old) < MAX_STEPS // len(members) and taken <= storage_bytes.get(sid, taken):
                blobs.append(delta)
                chains[sid] = (*old, step_of(now.number + 1, delta, member.view))
                continue
            wished = int(member.structure.parameters * self.job.compress.renewed_bits / 8) + 512
            limit = int(storage_bytes[sid] * RENEWED_SHARE) if sid in storage_bytes else wished
            room = max(keyframe_bytes[sid], limit)
            artifact = compress(member.master, member.structure, min(room, wished))
            members[sid] = replace(member, view=restore(artifact, member.structure))
            blobs.append(artifact)
            chains[sid] = (step_of(now.number + 1, artifact, members[sid].view),)
        return chains, blobs, members


def step_of(version: int, content: bytes, view: Vector) -> Step:
    """Return the link of a chain that `content` makes."""
    ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
    return Step(version=version, blob=ref, digest=digest(view))


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
