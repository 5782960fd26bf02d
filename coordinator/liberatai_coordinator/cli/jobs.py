"""`liberatai jobs`: trainings, what became of them, and who waits for what."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli.accuracy import accuracy_lines, explained
from liberatai_coordinator.cli.fits import fits_line, nothing_fits
from liberatai_coordinator.cli.job_text import ROUND_COLUMNS, STRUCTURE_COLUMNS, bytes_line, job_line
from liberatai_coordinator.cli.kit import FAILED, client_of, complete_job, group, job_text
from liberatai_coordinator.cli.tables import (
    WATCH_S,
    Column,
    Output,
    OutputOption,
    WatchOption,
    encoded,
    on_screen,
    patiently,
    progress,
    redraw,
    screen_width,
    show_list,
    show_one,
    shown,
    when_text,
    wrapped,
)
from liberatai_coordinator.cli.watch import watch_lines, watch_screen
from liberatai_coordinator.client.views import JobSummary, JobView

JobArgument = Annotated[str, typer.Argument(help="Name of the job.", autocompletion=complete_job)]


app = group("Federated trainings.", "liberatai jobs list")


@app.command("create", epilog="Example: liberatai jobs create -f job.yaml")
def jobs_create(
    context: typer.Context,
    file: Annotated[Path, typer.Option("--file", "-f", help="The job (YAML).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that creating checks, and create nothing.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create and start a job. Relative paths in the file start from its folder."""
    text = job_text(file)
    if dry_run:
        with client_of(context) as client, progress("planning"):
            plan = client.jobs.check(text, file.absolute().parent)
        if output.is_table:
            print(wrapped(f"job {plan.job}: {fits_line(plan)}", screen_width()))
            print("dry run: nothing was created; `liberatai plan show -f` says why, device by device")
        else:
            show_one(plan, output)
        if nothing_fits(plan):
            raise typer.Exit(FAILED)
        return
    with client_of(context) as client:
        job = client.jobs.create(text, file.absolute().parent)
    _show_job(job, output)
    if output.is_table:
        print(f"follow it: liberatai jobs watch {job.name}")


@app.command("list", epilog="Example: liberatai jobs list -o json")
def jobs_list(
    context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """List all jobs, oldest first."""
    with client_of(context) as client:
        found = client.jobs.list()
        show_list(client.jobs.list if watch else lambda: found, JOB_COLUMNS, output, watch=watch)
    if not found and output is Output.TABLE:
        print("liberatai: no job yet: `liberatai jobs create -f job.yaml` makes one", file=sys.stderr)


@app.command("show", epilog="Example: liberatai jobs show digits")
def jobs_show(
    context: typer.Context,
    name: JobArgument,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Show one job: what it decided, its structures, their accuracy, and its rounds."""
    with client_of(context) as client:
        if not watch:
            _show_job(client.jobs.show(name), output)
            return
        for job in patiently(lambda: client.jobs.show(name), every_s=WATCH_S):
            redraw(_job_lines(job, output))


@app.command("watch", epilog="Example: liberatai jobs watch digits")
def jobs_watch(
    context: typer.Context,
    name: JobArgument,
    interval: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Follow a job until it ends; exit 1 if it does not finish."""
    with client_of(context) as client:
        last = watch_screen(client, name, interval) if on_screen() else watch_lines(client, name, interval)
    if last.state != "finished":
        raise typer.Exit(FAILED)


@app.command("report", epilog="Example: liberatai jobs report digits --out digits-report")
def jobs_report(
    context: typer.Context,
    name: JobArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for page and record [default: NAME-report]."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make the report of a job: who answers and why, accuracy, bytes, what each device got and why."""
    from liberatai_coordinator.pictures import job_report

    with client_of(context) as client, progress(f"reporting {name}"):
        job = client.jobs.show(name)
        versions = client.models.log(name) if job.version or job.structures else ()
        ensemble = client.models.ensemble(name, str(versions[0].version)) if versions else None
        told = job_report.report_of(job, client.plan(name), client.devices.list(), versions, ensemble)
        if output.is_table:
            page, record = job_report.write(told, out or Path(f"{name}-report"))
    if not output.is_table:
        show_one(told, output)
        return
    measured = "" if told.accuracy is None else f", {told.accuracy:.1%} right on {told.measured}"
    print(wrapped(f"job {name}: {told.verdict}{measured}", screen_width()))
    print(f"{page} and {record.name}: written")


@app.command("pause", epilog="Example: liberatai jobs pause digits")
def jobs_pause(context: typer.Context, name: JobArgument) -> None:
    """Open no further round; the one that is open is finished."""
    with client_of(context) as client:
        print(job_line(client.jobs.pause(name)))


@app.command("resume", epilog="Example: liberatai jobs resume digits")
def jobs_resume(context: typer.Context, name: JobArgument) -> None:
    """Go on with a paused job."""
    with client_of(context) as client:
        print(job_line(client.jobs.resume(name)))


@app.command("abort", epilog="Example: liberatai jobs abort digits")
def jobs_abort(context: typer.Context, name: JobArgument) -> None:
    """End a job for good; its versions stay."""
    with client_of(context) as client:
        print(job_line(client.jobs.abort(name)))


@app.command("delete", epilog="Example: liberatai jobs delete digits")
def jobs_delete(context: typer.Context, name: JobArgument) -> None:
    """Forget an ended job with its rounds; its versions stay, and its name can be used again."""
    with client_of(context) as client:
        client.jobs.delete(name)
    print(f"job {name}: deleted; versions that it made stay")


def _show_job(job: JobView, output: Output) -> None:
    if not output.is_table:
        show_one(job, output)
        return
    for line in _job_lines(job, output):
        print(line)


def _job_lines(job: JobView, output: Output) -> list[str]:
    if not output.is_table:
        return [encoded(job, output)]
    width = screen_width()
    lines = [wrapped(line, width) for line in (job_line(job), bytes_line(job), *explained(job))]
    if job.structures:
        lines += ["", *shown(job.structures, STRUCTURE_COLUMNS, output)]
    lines += accuracy_lines(job, output)
    if job.rounds:
        lines += ["", *shown(job.rounds, ROUND_COLUMNS, output)]
    return lines


JOB_COLUMNS: list[Column[JobSummary]] = [
    Column("JOB", lambda row: row.name),
    Column("STATE", lambda row: row.state),
    Column("ROUNDS", lambda row: f"{row.rounds_done}/{row.rounds_total}", right=True),
    Column("VERSION", lambda row: str(row.version), right=True),
    Column("CREATED", lambda row: when_text(row.created_s)),
    Column("REASON", lambda row: row.reason, note=True),
    Column("SHARE", lambda row: f"{row.share:g}", wide=True, right=True),
]
