"""What `liberatai jobs show` says of accuracy on devices and on the coordinator's labels, and who decided."""

from dataclasses import dataclass

from liberatai_coordinator.cli.tables import Column, Output, clean, screen_width, shown, wrapped
from liberatai_coordinator.client.views import CentralView, JobView, LocalView, RoundView, ScoreView, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. None: not measured."""

    what: str
    name: str = ""
    devices: str = ""
    held_out: int | None = None
    local: float | None = None
    central: float | None = None
    test: float | None = None


def explained(job: JobView) -> list[str]:
    """Return how the newest version came about: by which rule, which ensemble, what the guard decided.

    And what the job goes without.
    """
    lacks = [f"without {one}" for one in job.lacks]
    made = next((one for one in reversed(job.rounds) if one.ensemble), None)
    if made is None:
        return lacks
    answers = "all structures together" if made.use == "ensemble" else f"{made.use} alone"
    return [
        f"round {made.round} merged by {clean(made.merged)}",
        f"ensemble: {made.ensemble}; answers: {clean(answers)}",
        f"guard: {clean(made.guard)}",
        *lacks,
    ]


def accuracy_lines(job: JobView, output: Output) -> list[str]:
    """Return the newest figures as a table; no line if there are none."""
    local, central, test = newest(job.rounds)
    found = rows(local, central, test)
    if not found:
        return []
    told = wrapped("; ".join(_sources(local, central, test)), screen_width())
    return ["", told, *shown(found, _columns(local, central, test), output)]


def rows(local: LocalView | None, central: CentralView | None, test: CentralView | None) -> list[Row]:
    """Return the lines of the table: structures, the ensemble, all devices, profiles, the worst tenth."""
    ids = {sid for one in (local, central, test) if one for sid in one.structures}
    structures = local.structures if local else {}
    lines = [
        _row("structure", sid, structures.get(sid), central=_of(central, sid), test=_of(test, sid))
        for sid in sorted(ids)
    ]
    if central or test:
        lines.append(
            Row(
                what="ensemble",
                central=central.ensemble if central else None,
                test=test.ensemble if test else None,
            )
        )
    if local:
        lines.append(_row("all devices", "", local.all))
        lines += [_row("profile", name, one) for name, one in sorted(local.profiles.items())]
        if local.worst:
            count = f"{local.worst.devices} of {local.worst.of}"
            lines.append(Row(what="worst 10 %", devices=count, local=local.worst.accuracy))
    return lines


def _row(
    what: str, name: str, score: ScoreView | None, *, central: float | None = None, test: float | None = None
) -> Row:
    return Row(
        what=what,
        name=name,
        devices=str(score.devices) if score else "",
        held_out=score.total if score else None,
        local=score.accuracy if score else None,
        central=central,
        test=test,
    )


def _of(scores: CentralView | None, sid: str) -> float | None:
    return scores.structures.get(sid) if scores else None


def _sources(local: LocalView | None, central: CentralView | None, test: CentralView | None) -> list[str]:
    sources = []
    if local:
        late = f" ({local.late} of {local.all.devices} devices: an older one)" if local.late else ""
        sources.append(f"local: version {local.version}{late} on what devices hold out")
    if central:
        sources.append(f"central: version {central.version} on the guard's {central.samples} labels")
    if test:
        sources.append(f"test: version {test.version} on {test.samples} labels that decide nothing")
    return sources


def _columns(
    local: LocalView | None, central: CentralView | None, test: CentralView | None
) -> list[Column[Row]]:
    columns: list[Column[Row]] = [
        Column("ACCURACY OF", lambda row: row.what),
        Column("NAME", lambda row: row.name),
    ]
    if local:
        columns += [
            Column("DEVICES", lambda row: row.devices, right=True),
            Column("HELD OUT", lambda row: "" if row.held_out is None else str(row.held_out), right=True),
            Column("LOCAL", lambda row: percent(row.local), right=True),
        ]
    if central:
        columns.append(Column("CENTRAL", lambda row: percent(row.central), right=True))
    if test:
        columns.append(Column("TEST", lambda row: percent(row.test), right=True))
    return columns


def percent(share: float | None) -> str:
    """Return an accuracy for people; "" if there is none."""
    return "" if share is None else f"{share:.1%}"


def of_round(view: RoundView) -> float | None:
    """Return what the version of a round answers right: on test labels, else on the guard's."""
    best = view.test or view.central
    return best.ensemble if best else None
