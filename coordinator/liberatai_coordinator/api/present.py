"""Every value as a client sees it. Nothing else makes views."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from liberatai_coordinator.client.views import (
    AssignmentView,
    CentralView,
    ContributionView,
    DeviceView,
    EnsembleView,
    JobState,
    JobSummary,
    JobView,
    LocalView,
    RoundView,
    SizesView,
    StructureView,
    TensorView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.fleet.keys import Knock
from liberatai_coordinator.fleet.plan import Assignment, Candidate
from liberatai_coordinator.jobs.records import Contribution, stats_of
from liberatai_coordinator.models.evaluation import CentralScores, LocalScores
from liberatai_coordinator.store.manifests import Manifest, MemberRecord, decode_manifest, decode_variant
from liberatai_coordinator.store.rows import JobRow, RoundSummary, VariantRow, VersionRow
from liberatai_core.compressor.codebook import smallest_bytes
from liberatai_core.compressor.contents import TensorSize
from liberatai_core.contract.frame import fingerprint
from liberatai_core.contract.messages import Capability, Report
from liberatai_core.profile import form_of
from liberatai_core.structure import Structure

INVITED: Final = "invited"
"""Phase of a device that was asked for an update and has said nothing of it: it fetches, trains or sends."""
ORDINARY: Final = frozenset({"idle", "fetching", "training", "sending"})
"""Phases of an ordinary round; what keeps a device from any round, gated or failed, holds on."""


def device_view(
    device: Device,
    shown: tuple[str, str],
    structure: str,
    refusals: Mapping[str, int],
    invited: tuple[str, int] | None,
    knock: Knock | None = None,
    certificate_end_s: float = 0.0,
) -> DeviceView:
    """Return a device.

    Args:
        device: as the fleet knows it.
        shown: its state, and what is odd about it (`Fleet.shown`).
        structure: that it trains in the newest job it takes part in; "" for none.
        refusals: number of refused messages by error code.
        invited: (job, round) that waits for its update; None: none does.
        knock: another key that asks for its name.
        certificate_end_s: end of its newest certificate; 0: it has none from here.
    """
    capability = device.capability
    phase, job, number = _work_of(device.report, invited)
    return DeviceView(
        id=device.id,
        status=device.status,
        state=shown[0],
        phase=phase,
        reason=device.reason or shown[1] or (device.report.reason if device.report else ""),
        profile=capability.profile if capability else "",
        tier=capability.tier if capability else "",
        form=form_of(capability.tier, capability.runtimes) if capability else "",
        arch=capability.arch if capability else "",
        cores=capability.cores if capability else 0,
        cpu_share=capability.cpu_share if capability else 0.0,
        memory_bytes=capability.memory_bytes if capability else 0,
        storage_bytes=capability.storage_bytes if capability else 0,
        gflops=capability.gflops if capability else None,
        up_bits_s=capability.up_bits_s if capability else None,
        down_bits_s=capability.down_bits_s if capability else None,
        link_measured=capability.link_measured if capability else False,
        metered=capability.metered if capability else False,
        day_quota_bytes=capability.day_quota_bytes if capability else 0,
        quota_spent=capability.quota_spent if capability else False,
        samples=capability.samples if capability else 0,
        job=job,
        structure=structure,
        round=number,
        last_seen_s=device.last_seen_s,
        agent_version=capability.agent_version if capability else "",
        sent_bytes=device.traffic.sent_bytes,
        received_bytes=device.traffic.received_bytes,
        updates=device.updates,
        round_sent_bytes=device.traffic.sent_bytes // max(1, device.updates),
        round_received_bytes=device.traffic.received_bytes // max(1, device.updates),
        refusals=dict(refusals),
        key=fingerprint(device.public_key),
        certificate_end_s=certificate_end_s,
        labels=dict(device.labels),
        drained=device.drained is not None,
        knocks=fingerprint(knock.public_key) if knock else "",
    )


def _work_of(report: Report | None, invited: tuple[str, int] | None) -> tuple[str, str, int]:
    """Return (phase, job, round) of a device.

    It does not report every phase of an ordinary round: what it said before it was invited is out of date.
    """
    if invited is None:
        if report is not None and report.phase in ORDINARY and report.round:
            # It has answered, or the round is over: that it is idle again it says only when that lasts.
            return "idle", "", 0
        return (report.phase, report.job, report.round) if report else ("", "", 0)
    if report is None:
        return INVITED, *invited
    of_this_round = (report.job, report.round) == invited
    holds_on = report.phase not in ORDINARY and not report.round
    return report.phase if of_this_round or holds_on else INVITED, *invited


def job_summary(row: JobRow, newest: VersionRow | None, waits: str) -> JobSummary:
    """Return a job without its rounds.

    Args:
        row: of the ledger.
        newest: version that it made; None before the first one.
        waits: why no round opens, in words; "" while one is open.
    """
    number = newest.number if newest else 0
    spec = spec_of(row)
    return JobSummary(
        name=row.name,
        state="failed" if spec is None else msgspec.convert(row.state, JobState),
        rounds_done=max(0, number - row.first_version),
        rounds_total=0 if spec is None else spec.rounds.count,
        created_s=row.created_s,
        reason=row.reason or waits or ("" if spec else UNREADABLE),
        version=number,
        share=1.0 if spec is None else spec.share,
    )


UNREADABLE: Final = "another release wrote this job: install that one, or delete the job"


def spec_of(row: JobRow) -> JobSpec | None:
    """Return what a job asks for; None if this release cannot read it."""
    try:
        return msgspec.json.decode(row.spec, type=JobSpec)
    except msgspec.MsgspecError:
        return None


def job_view(
    row: JobRow,
    newest: VersionRow | None,
    assigned: Sequence[Assignment],
    rounds: tuple[RoundView, ...],
    waits: str,
) -> JobView:
    """Return a job.

    Args:
        row: of the ledger.
        newest: version that it made; None before the first one.
        assigned: its plan.
        rounds: all of them.
        waits: why no round opens, in words; "" while one is open.
    """
    summary = job_summary(row, newest, waits)
    spec = spec_of(row)
    return JobView(
        name=row.name,
        state=summary.state,
        rounds_done=summary.rounds_done,
        rounds_total=summary.rounds_total,
        created_s=row.created_s,
        reason=summary.reason,
        version=summary.version,
        share=summary.share,
        structures=structure_views(newest, assigned),
        rounds=rounds,
        updates=sum(view.updates for view in rounds),
        up_bytes=sum(view.up_bytes for view in rounds),
        down_bytes=sum(view.down_bytes for view in rounds),
        lacks=() if spec is None else spec.lacks,
    )


def structure_views(newest: VersionRow | None, assigned: Sequence[Assignment]) -> tuple[StructureView, ...]:
    """Return the structures of a job's newest version; () before the first one."""
    if newest is None:
        return ()
    return tuple(
        StructureView(
            id=sid,
            family=record.structure.family,
            parameters=record.structure.parameters,
            smallest_bytes=smallest_bytes(record.structure),
            keyframe_bytes=record.keyframe.size,
            devices=sum(a.structure == sid for a in assigned),
        )
        for sid, record in sorted(decode_manifest(newest.manifest).structures.items())
    )


def candidate_view(candidate: Candidate, keyframe_bytes: int, devices: int) -> StructureView:
    """Return a structure of a job that has no version yet.

    Args:
        candidate: the structure, and what it needs.
        keyframe_bytes: budget of its file; 0: no device gets it.
        devices: number of devices that would get it.
    """
    return StructureView(
        id=candidate.id,
        family=candidate.family,
        parameters=candidate.parameters,
        smallest_bytes=candidate.smallest_bytes,
        keyframe_bytes=keyframe_bytes,
        devices=devices,
    )


def assignment_view(
    assigned: Assignment, capability: Capability | None, variant_bytes: int
) -> AssignmentView:
    """Return what a device gets.

    Args:
        assigned: by the plan.
        capability: of the device; None: not known any more.
        variant_bytes: what the files of its structure take on the device.
    """
    return AssignmentView(
        device=assigned.device,
        profile=capability.profile if capability else "",
        tier=capability.tier if capability else "",
        structure=assigned.structure,
        variant_bytes=variant_bytes,
        budget_bytes=assigned.budget_bytes,
        density=assigned.density,
        why=assigned.why,
        link=assigned.link,
    )


def stored_bytes(manifest: Manifest) -> dict[str, int]:
    """Return what the files of each structure take on a device: keyframe and deltas."""
    return {
        sid: record.keyframe.size + sum(delta.size for delta in record.deltas)
        for sid, record in manifest.structures.items()
    }


def version_view(row: VersionRow) -> VersionView:
    """Return a version."""
    manifest = decode_manifest(row.manifest)
    return VersionView(
        model=row.model,
        version=row.number,
        id=row.id,
        parent=row.parent,
        created_s=row.created_s,
        round=manifest.round,
        updates=len(manifest.updates),
        digests={sid: record.digest for sid, record in manifest.structures.items()},
        bytes=stored_bytes(manifest),
        ensemble=manifest.ensemble.method,
        guard=manifest.ensemble.guard,
        tags=row.tags,
    )


def ensemble_view(row: VersionRow) -> EnsembleView:
    """Return how a version's structures are combined."""
    record = decode_manifest(row.manifest).ensemble
    return msgspec.convert(record, EnsembleView, from_attributes=True)


def variant_view(row: VariantRow) -> VariantView:
    """Return a variant."""
    manifest = decode_variant(row.manifest)
    return VariantView(
        model=row.model,
        version=row.number,
        parent=manifest.parent,
        id=row.id,
        parent_structure=manifest.parent_structure,
        structure=manifest.structure.id,
        family=manifest.structure.family,
        params=manifest.structure.params,
        parameters=manifest.structure.parameters,
        bytes=manifest.size,
        budget_bytes=manifest.budget_bytes,
        file=manifest.file,
        digest=manifest.digest,
        method=manifest.method,
        why=manifest.why,
        divergence=manifest.divergence,
        agreement=manifest.agreement,
        accuracy=manifest.accuracy,
        seed=manifest.seed,
        created_s=row.created_s,
    )


def variant_detail(row: VariantRow, sizes: Sequence[TensorSize]) -> VariantDetail:
    """Return a variant with its structure and where its bytes go."""
    manifest = decode_variant(row.manifest)
    return VariantDetail(
        variant=variant_view(row),
        structure=manifest.structure,
        data=manifest.data,
        tensors=tensor_views(sizes, manifest.structure),
    )


def sizes_view(structure: str, member: MemberRecord, sizes: Sequence[TensorSize]) -> SizesView:
    """Return where the bytes of one structure's files go.

    Args:
        structure: its id.
        member: what the version has of it.
        sizes: of its keyframe.
    """
    return SizesView(
        structure=structure,
        parameters=member.structure.parameters,
        keyframe_bytes=member.keyframe.size,
        delta_bytes=sum(delta.size for delta in member.deltas),
        tensors=tensor_views(sizes, member.structure),
    )


def tensor_views(sizes: Sequence[TensorSize], structure: Structure) -> tuple[TensorView, ...]:
    """Return what each tensor of a model file takes."""
    shapes = {tensor.name: tensor.shape for tensor in structure.tensors}
    return tuple(
        TensorView(
            name=size.name,
            shape=shapes.get(size.name, ()),
            weights=size.weights,
            kind=size.kind,
            bytes=size.bytes,
            distinct=size.distinct,
        )
        for size in sizes
    )


def round_view(row: RoundSummary, updates: int) -> RoundView:
    """Return one round.

    Args:
        row: of the ledger.
        updates: that it has.
    """
    stats = stats_of(row.stats)
    return RoundView(
        round=row.round,
        state=row.state,
        invited=row.asked,
        updates=updates,
        seconds=stats.seconds,
        train_seconds_max=stats.train_seconds_max,
        teach_seconds=stats.teach_seconds,
        up_bytes=stats.up_bytes,
        down_bytes=stats.down_bytes,
        reason=row.reason or "; ".join(f"{sid} frozen: {why}" for sid, why in stats.frozen.items()),
        guard=stats.guard,
        merged=stats.merged,
        ensemble=stats.ensemble,
        use=stats.use,
        local=None if stats.local is None else local_view(stats.local),
        central=None if stats.central is None else central_view(stats.central),
        test=None if stats.test is None else central_view(stats.test),
    )


def local_view(scores: LocalScores) -> LocalView:
    """Return what devices scored on their own hold-outs."""
    return msgspec.convert(scores, LocalView, from_attributes=True)


def central_view(scores: CentralScores) -> CentralView:
    """Return what a version reaches on labels of the coordinator."""
    return msgspec.convert(scores, CentralView, from_attributes=True)


def contribution_view(job: str, number: int, given: Contribution) -> ContributionView:
    """Return what one update of a device gave."""
    return ContributionView(
        job=job, round=number, verdict=given.verdict, norm=given.norm, cosine=given.cosine
    )
