"""The report of any job: who answers and why, accuracy and bytes by round, what each device got and why.

Made from what a client is shown: one record (`report.json`), and one page (`report.html`) made from it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from liberatai_coordinator.client.views import (
    DeviceView,
    EnsembleView,
    JobView,
    LocalView,
    PlanView,
    RoundView,
    VersionView,
    newest,
)
from liberatai_coordinator.pictures import heat_map, report
from liberatai_coordinator.pictures.report import COLOURS, DeviceLine, RoundLine, StructureRow
from liberatai_core.errors import DiskError
from liberatai_core.units import when_text

FLOAT_BYTES = 4


class JobReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job: the contents of its `report.json`.

    Attributes:
        verdict: who answers, by the guard, in one sentence; the headline.
        guard: what the guard said.
        accuracy: share of right answers of what answers; None: nobody measured it.
        measured: on what, in words; "" if nobody measured.
        rounds: that made a version, with accuracy by structure and "ensemble" where it was measured.
        abandoned: rounds that made none.
        dense_bytes: float32 FedAvg of the same structures for the same updates, payload only.
        total_bytes: what the sockets of the devices that answered carried, both ways.
        lacks: what the job goes without for want of the coordinator's own data.
    """

    name: str
    state: str
    reason: str
    created_s: float
    verdict: str
    guard: str
    merged: str
    accuracy: float | None
    measured: str
    rounds_total: int
    rounds: tuple[RoundLine, ...]
    abandoned: int
    devices: tuple[DeviceLine, ...]
    structures: tuple[StructureRow, ...]
    versions: int
    version_id: str
    updates: int
    up_bytes: int
    down_bytes: int
    total_bytes: int
    dense_bytes: int
    seconds: float
    local: LocalView | None = None
    ensemble: EnsembleView | None = None
    lacks: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times less than dense FedAvg went over the sockets; 0: nothing is known."""
        return self.dense_bytes / self.total_bytes if self.total_bytes else 0.0


def report_of(
    job: JobView,
    plan: PlanView,
    devices: Sequence[DeviceView],
    versions: Sequence[VersionView],
    ensemble: EnsembleView | None,
) -> JobReport:
    """Return the report of a job.

    Args:
        job: with its rounds.
        plan: that is in force.
        devices: of the fleet.
        versions: of its model, the newest first.
        ensemble: of the newest version; None before the first one.
    """
    made = [row for row in job.rounds if row.state == "published"]
    local, central, test = newest(job.rounds)
    judged = test or central
    last = made[-1] if made else None
    parameters = {one.id: one.parameters for one in job.structures}
    return JobReport(
        name=job.name,
        state=job.state,
        reason=job.reason,
        created_s=job.created_s,
        verdict=verdict(last),
        guard=last.guard if last else "",
        merged=last.merged if last else "",
        accuracy=judged.ensemble if judged else local.all.accuracy if local else None,
        measured=_measured(job.rounds),
        rounds_total=job.rounds_total,
        rounds=tuple(_round(row) for row in made),
        abandoned=sum(row.state == "abandoned" for row in job.rounds),
        devices=tuple(_devices(plan, devices)),
        structures=tuple(
            StructureRow(id=one.id, family=one.family, parameters=one.parameters, devices=one.devices)
            for one in job.structures
        ),
        versions=len(versions),
        version_id=versions[0].id if versions else "",
        updates=job.updates,
        up_bytes=job.up_bytes,
        down_bytes=job.down_bytes,
        total_bytes=job.up_bytes + job.down_bytes,
        dense_bytes=_dense_bytes(plan, parameters, job.updates),
        seconds=sum(row.seconds for row in made),
        local=local,
        ensemble=ensemble,
        lacks=job.lacks,
    )


def verdict(last: RoundView | None) -> str:
    """Return in a sentence who answers, by the guard."""
    if last is None:
        return "no version yet: nobody answers"
    if last.use in ("", "ensemble"):
        return "all structures together answer"
    return f"{last.use} alone answers: the guard does not use the ensemble"


def _measured(rounds: Sequence[RoundView]) -> str:
    local, central, test = newest(rounds)
    if test is not None:
        return f"{test.samples:,} labels that decide nothing"
    if central is not None:
        return f"the guard's {central.samples:,} labels"
    if local is not None:
        return "what devices hold out of their own data"
    return ""


def _round(row: RoundView) -> RoundLine:
    judged = row.test or row.central
    accuracy = dict(judged.structures) | {"ensemble": judged.ensemble} if judged else {}
    if not judged and row.local is not None:
        accuracy = {
            sid: one.accuracy for sid, one in row.local.structures.items() if one.accuracy is not None
        }
    return RoundLine(
        round=row.round,
        seconds=row.seconds,
        train_seconds_max=row.train_seconds_max,
        teach_seconds=row.teach_seconds,
        up_bytes=row.up_bytes,
        down_bytes=row.down_bytes,
        accuracy=accuracy,
        updates=row.updates,
        invited=row.invited,
    )


def _devices(plan: PlanView, devices: Sequence[DeviceView]) -> list[DeviceLine]:
    known = {one.id: one for one in devices}
    lines = []
    for one in plan.assignments:
        device = known.get(one.device)
        lines.append(
            DeviceLine(
                id=one.device,
                profile=one.profile or "no profile",
                tier=one.tier or "unknown",
                structure=one.structure,
                variant_bytes=one.variant_bytes,
                budget_bytes=one.budget_bytes,
                why="; ".join(part for part in (one.why, one.link) if part),
                samples=device.samples if device else 0,
                sent_bytes=device.sent_bytes if device else 0,
                received_bytes=device.received_bytes if device else 0,
            )
        )
    return lines


def _dense_bytes(plan: PlanView, parameters: Mapping[str, int], updates: int) -> int:
    """Return what float32 FedAvg would carry for so many updates of devices as the plan has them."""
    given = [parameters[one.structure] for one in plan.assignments if one.structure in parameters]
    return round(2 * FLOAT_BYTES * updates * sum(given) / len(given)) if given else 0


def write(told: JobReport, folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder, made if needed, and return their paths.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed. DiskError: it cannot be written.
    """
    content = html(told)
    page, record = folder / "report.html", folder / "report.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
        page.write_text(content, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written ({error.strerror})") from None
    return page, record


def html(told: JobReport) -> str:
    """Return the whole page: no script, no file beside it, no network.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    ordered = sorted(told.structures, key=lambda row: -row.parameters)
    colours = {one.id: COLOURS[place % len(COLOURS)] for place, one in enumerate(ordered)}
    drawn = [row for row in told.rounds if row.accuracy]
    environment = report.templates()
    environment.filters |= {"when": when_text}
    page: str = environment.get_template("job_report.html.j2").render(
        report=told,
        colours=colours,
        ensemble_colour=report.ENSEMBLE_COLOUR,
        accuracy_picture=report.accuracy_picture(drawn, colours, "right answers, %") if drawn else "",
        bytes_picture=report.bytes_picture(told.rounds, told.dense_bytes) if told.rounds else "",
        heat_map=heat_map.table(told.ensemble) if told.ensemble and told.ensemble.weights else "",
        how=heat_map.sentence(told.ensemble) if told.ensemble else "",
    )
    return page + "\n"
