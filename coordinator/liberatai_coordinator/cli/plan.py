"""`liberatai plan`: which device gets which variant, and why."""

from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli.fits import fits_line, nothing_fits
from liberatai_coordinator.cli.job_text import STRUCTURE_COLUMNS
from liberatai_coordinator.cli.kit import FAILED, client_of, group, job_text
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    progress,
    screen_width,
    show,
    show_one,
    size_text,
    wrapped,
)
from liberatai_coordinator.client.views import AssignmentView, PlanView
from liberatai_core.errors import ConfigError

app = group("Which device gets which variant, and why.", "liberatai plan show")


@app.command("show", epilog="Example: liberatai plan show -f job.yaml --dry-run")
def plan_show(
    context: typer.Context,
    job: Annotated[
        str | None, typer.Option("--job", help="An existing job; the newest one if left out.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A job that is only described: nothing is created.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say so explicitly: needs -f, and creates nothing.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show which device gets which variant, and why."""
    if job is not None and file is not None:
        raise ConfigError("plan show", ["give --job or --file, not both"])
    if dry_run and file is None:
        raise ConfigError("plan show", ["--dry-run needs --file: the plan of an existing job is in force"])
    text = None if file is None else job_text(file)
    with client_of(context) as client, progress("planning"):
        plan = client.plan(job, text)
    _show_plan(plan, output)
    if nothing_fits(plan):
        raise typer.Exit(FAILED)


def _show_plan(plan: PlanView, output: Output) -> None:
    if not output.is_table:
        show_one(plan, output)
        return
    print(f"plan of {plan.job}{' (dry run: nothing is assigned)' if plan.dry_run else ''}")
    print(wrapped(fits_line(plan), screen_width()))
    print()
    show(plan.assignments, ASSIGNMENT_COLUMNS, output)
    print()
    show(plan.structures, STRUCTURE_COLUMNS, output)


ASSIGNMENT_COLUMNS: list[Column[AssignmentView]] = [
    Column("DEVICE", lambda row: row.device),
    Column("PROFILE", lambda row: row.profile),
    Column("TIER", lambda row: row.tier),
    Column("STRUCTURE", lambda row: row.structure or "none"),
    Column("SIZE", lambda row: size_text(row.variant_bytes), right=True),
    Column("BUDGET", lambda row: size_text(row.budget_bytes), right=True),
    Column("DENSITY", lambda row: f"{row.density:.2%}", right=True),
    Column("WHY", lambda row: "; ".join(part for part in (row.why, row.link) if part), note=True),
]
