"""Jobs, rounds and structures as lines and columns."""

from liberatai_coordinator.cli.accuracy import of_round, percent
from liberatai_coordinator.cli.tables import Column, clean, count_text, duration_text, size_text
from liberatai_coordinator.client.views import JobView, RoundView, StructureView


def job_line(job: JobView) -> str:
    """Return a job in one line."""
    reason = f" ({clean(job.reason)})" if job.reason else ""
    return f"job {job.name}: {job.state}{reason}, {job.rounds_done} of {job.rounds_total} rounds"


def bytes_line(job: JobView) -> str:
    """Return what a job's rounds moved, in one line."""
    told = f"all rounds: {size_text(job.up_bytes)} up, {size_text(job.down_bytes)} down"
    if not job.updates:
        return told
    each = f"{size_text(job.up_bytes / job.updates)} up, {size_text(job.down_bytes / job.updates)} down"
    return f"{told}; per update: {each}"


def round_line(view: RoundView) -> str:
    """Return a round in one line; what it took only where that is known."""
    reason = f" ({clean(view.reason)})" if view.reason else ""
    words = [
        f"round {view.round}: {view.state}{reason}",
        f"{count_text(view.updates)} of {count_text(view.invited)} updates",
    ]
    if measured(view):
        words.append(duration_text(view.seconds))
        words += [f"{size_text(view.up_bytes)} up", f"{size_text(view.down_bytes)} down"]
    if of_round(view) is not None:
        words.append(f"accuracy {percent(of_round(view))}")
    return ", ".join(words)


def measured(view: RoundView) -> bool:
    """Whether it is known what a round took: it made a version."""
    return view.state in ("aggregated", "published")


ROUND_COLUMNS: list[Column[RoundView]] = [
    Column("ROUND", lambda row: str(row.round), right=True),
    Column("STATE", lambda row: row.state),
    Column("UPDATES", lambda row: f"{row.updates}/{row.invited}", right=True),
    Column("TIME", lambda row: duration_text(row.seconds) if measured(row) else "", right=True),
    Column("UP", lambda row: size_text(row.up_bytes) if measured(row) else "", right=True),
    Column("DOWN", lambda row: size_text(row.down_bytes) if measured(row) else "", right=True),
    Column("ACCURACY", lambda row: percent(of_round(row)), right=True),
    Column("REASON", lambda row: row.reason, note=True),
    Column(
        "TRAIN MAX",
        lambda row: duration_text(row.train_seconds_max) if measured(row) else "",
        wide=True,
        right=True,
    ),
    Column(
        "TEACH", lambda row: duration_text(row.teach_seconds) if measured(row) else "", wide=True, right=True
    ),
    Column("GUARD", lambda row: row.guard, wide=True, note=True),
    Column("MERGED BY", lambda row: row.merged, wide=True, note=True),
]
STRUCTURE_COLUMNS: list[Column[StructureView]] = [
    Column("STRUCTURE", lambda row: row.id),
    Column("FAMILY", lambda row: row.family),
    Column("PARAMETERS", lambda row: count_text(row.parameters), right=True),
    Column("FLOAT32", lambda row: size_text(4 * row.parameters), right=True),
    Column("KEYFRAME", lambda row: size_text(row.keyframe_bytes) if row.keyframe_bytes else "", right=True),
    Column("SMALLEST", lambda row: size_text(row.smallest_bytes), right=True),
    Column("DEVICES", lambda row: str(row.devices), right=True),
]
