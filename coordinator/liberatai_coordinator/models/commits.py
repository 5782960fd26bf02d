"""Versions of trainings as commits of the model repository, which people log, tag, pull, merge and push.

The ledger is the truth about a training: its newest version with what only the coordinator needs (its own
float32 weights, moments, chains). A commit holds what devices hold, decoded exactly: keyframe and deltas are
the very files that travelled. It follows from the ledger alone, so whatever a crash left out is committed
later, and comes out the same.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from liberatai_coordinator.models.evaluation import CentralScores
from liberatai_coordinator.repository import care, tensors
from liberatai_coordinator.repository.commits import Commit, Variant
from liberatai_coordinator.repository.descriptors import (
    COMPRESSED,
    DELTA,
    DIFFERENCE,
    TITLE,
    Descriptor,
    describe,
)
from liberatai_coordinator.repository.history import Entry
from liberatai_coordinator.repository.names import BRANCH
from liberatai_coordinator.repository.store import Layer, Loaded, Store
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import (
    Manifest,
    MemberRecord,
    StepRecord,
    VariantManifest,
    decode_manifest,
    decode_variant,
)
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import VariantRow, VersionRow
from liberatai_core.compressor import artifact, exact_difference
from liberatai_core.errors import LiberataiError, NotFoundError, RoundUnknownError, StateError
from liberatai_core.sparsifier.top_k import densify
from liberatai_core.weights import Vector, digest, from_bytes

log = logging.getLogger(__name__)

ASIDE: Final = "training"
"""The branch of a training whose model's `latest` somebody else has moved."""


class _Measured(msgspec.Struct, frozen=True):
    """What a commit tells of a round's record (`jobs.records.Stats`)."""

    test: CentralScores | None = None
    central: CentralScores | None = None


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job that goes on from a commit began.

    Attributes:
        commit: digest.
        accuracy: of version 0 on held-out labels of the coordinator; None: there are none.
    """

    commit: str
    accuracy: float | None = None


STARTED: Final = "started"
"""Name under which the ledger has a job's `Started`."""


@dataclass(slots=True, kw_only=True)
class Commits:
    """Commits what the ledger has; safe for several threads.

    Attributes:
        author: name of the coordinator.
    """

    store: Store
    ledger: Ledger
    repository: Repository
    author: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def publish_all(self) -> int:
        """Commit whatever of all models is not committed yet, e.g. after a crash or of an older release."""
        return sum(self.publish(model) for model in self.ledger.versions.models())

    def publish(self, model: str) -> int:
        """Commit the versions and variants of a model that are not committed yet; returns how many.

        Raises:
            DiskError: the disk refuses; the next call goes on.
        """
        with self._lock:
            known = self._known(model)
            made = 0
            for row in self.ledger.versions.all(model):
                if row.number in known or row.collected:
                    continue
                try:
                    known[row.number] = self._commit(row, known)
                    made += 1
                except NotFoundError as error:
                    log.info("%s version %d is not committed: %s", model, row.number, error)
            return made + self._variants(model, known)

    def _known(self, model: str) -> dict[int, str]:
        """Return the commits of a model's versions, by number."""
        starts = [one.digest for one in self.store.names(model)]
        return {
            entry.number: entry.digest
            for entry in self.store.log(starts)
            if entry.kind in ("round", "finetune") and entry.number is not None and entry.model == model
        }

    def _commit(self, row: VersionRow, known: dict[int, str]) -> str:
        manifest = decode_manifest(row.manifest)
        measured = self._measured(manifest, row)
        scores = measured.test or measured.central
        described, layers = [], {}
        for sid, record in sorted(manifest.structures.items()):
            accuracy = scores.structures.get(sid) if scores else None
            parts, view = self._layers(record)
            layers[sid] = parts
            described.append(
                Variant(
                    name=sid,
                    manifest=tensors.NONE,
                    size=2,
                    runtime="liberatai",
                    bytes=sum(one.size for one, _ in parts),
                    structure=record.structure,
                    weights=record.digest,
                    tier="full",
                    sparsity=1 - float(np.count_nonzero(view) / view.size),
                    metrics={} if accuracy is None else {"accuracy": accuracy},
                )
            )
        started = self._started(row)
        parent = known.get(row.number - 1) if row.parent is not None else None
        if parent is None and started is not None and self.store.layout.has(started.commit):
            parent = started.commit
        draft = Commit(
            model=row.model,
            kind="round" if started is None else "finetune",
            parents=() if parent is None else (parent,),
            author=self.author,
            time=int(row.created_s),
            message=f"round {manifest.round}" if manifest.round else "initial weights",
            number=row.number,
            job=row.model,
            round=manifest.round,
            updates=len(manifest.updates),
            samples=sum(record.samples for record in manifest.structures.values()),
            metrics=self._metrics(measured),
            data=manifest.data,
            ensemble=manifest.ensemble if len(manifest.structures) > 1 else None,
            variants=tuple(described),
        )
        reached = draft.metrics.get("held_out_accuracy")
        limit = None if started is None else started.accuracy
        worse = limit is not None and reached is not None and reached < limit
        return self._write(draft, layers, aside=worse).digest

    def _started(self, row: VersionRow) -> Started | None:
        """Return where the job of a version began, if it went on from a commit."""
        try:
            job = self.ledger.jobs.get(row.model)
        except NotFoundError:
            return None
        stored = self.ledger.jobs.value(row.model, STARTED) if row.number >= job.first_version else None
        return msgspec.msgpack.decode(stored, type=Started) if stored else None

    def _write(self, draft: Commit, layers: dict[str, list[Layer]], *, aside: bool) -> Loaded:
        """Write a version; one that is worse than what its job began with stays off the usual branch."""
        if aside:
            log.info("%s version %s is worse than its start: not on %s", draft.model, draft.number, BRANCH)
            return self.store.write(draft, layers, branch=ASIDE, force=True)
        try:
            return self.store.write(draft, layers)
        except StateError:
            # An operator committed to `latest`: it is theirs; the training goes on beside it.
            return self.store.write(draft, layers, branch=ASIDE, force=True)

    def _metrics(self, measured: "_Measured") -> dict[str, float]:
        scores = measured.test or measured.central
        told = {"accuracy": scores.ensemble} if scores else {}
        held_out = measured.central or measured.test
        return told | ({"held_out_accuracy": held_out.ensemble} if held_out else {})

    def _measured(self, manifest: Manifest, row: VersionRow) -> "_Measured":
        """Return what the round that made a version measured of it: on test data, and on the guard's."""
        try:
            found = self.ledger.rounds.get(row.model, manifest.round)
        except RoundUnknownError:
            return _Measured()
        if found.version_id != row.id or not found.stats:
            return _Measured()
        return msgspec.msgpack.decode(found.stats, type=_Measured)

    def _layers(self, record: MemberRecord) -> tuple[list[Layer], Vector]:
        """Return the files that devices fetch; where they do not add up, an exact difference besides."""
        view = from_bytes(self.repository.get(record.view))
        layers = [self._layer(record.keyframe, COMPRESSED, "model.lam")]
        weights = artifact.restore(self.repository.get(record.keyframe.blob), record.structure)
        plain: list[Layer] = []
        reached = weights
        try:
            for number, step in enumerate(record.deltas):
                plain.append(self._layer(step, DELTA, f"delta.{number}.bin"))
                reached = reached + densify(self.repository.get(step.blob), record.structure)
        except LiberataiError:
            plain = []  # deltas of a part of the weights: their places are the job's
        if digest(reached).hex() == record.digest and len(plain) == len(record.deltas):
            return [*layers, *plain], view
        change = exact_difference.encode(weights, view)
        return [*layers, (describe(change, DIFFERENCE, {TITLE: "change.bin"}), change)], view

    def _layer(self, step: StepRecord, media_type: str, name: str) -> Layer:
        wanted = Descriptor(
            media_type=media_type, digest=f"sha256:{step.blob}", size=step.size, annotations={TITLE: name}
        )
        if self.store.layout.link(self.repository.path(step.blob), wanted):
            return wanted, None
        return wanted, self.repository.get(step.blob)

    # --- variants that were fitted -------------------------------------------------------------------

    def _variants(self, model: str, known: dict[int, str]) -> int:
        """Commit variants: one commit per version that holds all of its, on a branch of its own."""
        made = 0
        for number in sorted({row.number for row in self.ledger.versions.variants(model)} & known.keys()):
            rows = self.ledger.versions.variants(model, number)
            parent = self.store.read(known[number])
            named = {one.name: one for one in self._fitted(model, number)}
            wanted = {self._name(row): row for row in rows}
            if wanted.keys() <= named.keys():
                continue
            self._commit_variants(model, number, parent, rows)
            made += 1
        return made

    def _fitted(self, model: str, number: int) -> Sequence[Variant]:
        branch = next((one for one in self.store.names(model) if one.tag == fitted_branch(number)), None)
        return () if branch is None else self.store.read(branch.digest).commit.variants

    def _name(self, row: VariantRow) -> str:
        return f"{row.structure[:120]}-{row.size_bytes}-{row.id[:8]}"

    def _commit_variants(self, model: str, number: int, parent: Loaded, rows: Sequence[VariantRow]) -> None:
        described: list[Variant] = []
        layers: dict[str, list[Layer]] = {}
        for row in rows:
            manifest: VariantManifest = decode_variant(row.manifest)
            name = self._name(row)
            file = self.repository.get(manifest.file)
            told = {
                "accuracy": manifest.accuracy,
                "agreement": manifest.agreement,
                "divergence": manifest.divergence,
            }
            layers[name] = [(describe(file, COMPRESSED, {TITLE: "model.lam"}), file)]
            described.append(
                Variant(
                    name=name,
                    manifest=tensors.NONE,
                    size=2,
                    runtime="liberatai",
                    bytes=manifest.size,
                    structure=manifest.structure,
                    weights=manifest.digest,
                    parent_structure=manifest.parent_structure,
                    budget=manifest.budget_bytes,
                    tier="observe",
                    metrics={key: value for key, value in told.items() if value is not None},
                    why=manifest.why,
                )
            )
        draft = Commit(
            model=model,
            kind="variant",
            parents=(parent.digest,),
            author=self.author,
            time=int(max(row.created_s for row in rows)),
            message=f"{len(rows)} variants of version {number}",
            data=parent.commit.data,
            labels=parent.commit.labels,
            licence=parent.commit.licence,
            variants=tuple(described),
        )
        self.store.write(draft, layers, branch=fitted_branch(number), force=True)

    # --- old ones --------------------------------------------------------------------------------

    def collect(self, model: str, newest: int, every: int) -> None:
        """Let go of the files of old rounds of one model; what has a tag keeps them, and so do all others."""

        def keep(entry: Entry, age: int) -> bool:
            if entry.model != model or entry.kind not in ("round", "finetune") or entry.number is None:
                return True
            return age < newest or (every > 0 and entry.number % every == 0) or not entry.parents

        with self._lock:
            care.gc(self.store, keep)


def fitted_branch(number: int) -> str:
    """Return the branch of the variants of a version."""
    return f"fit-{number}"
